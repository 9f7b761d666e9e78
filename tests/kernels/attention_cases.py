"""Decode and write kernels against their specifications, on any device that runs them: a GPU, or Triton's interpreter.

`TRITON_INTERPRET=1 python -m tests.kernels.attention_cases` runs tiny sizes on a CPU; on a GPU host
`compute-sanitizer python -m tests.kernels.attention_cases` checks the memory accesses of the same sizes.
"""

import math
from types import SimpleNamespace

import torch

from oscar_radix.codec.int8_rows import dequantise_rows
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.policy.base import LEVELS
from oscar_radix.pool.store import KVStore
from tests.helpers import random_qkv
from tests.kernels.mass_levels_cases import mend_interpreter, random_store

SCALE = 0.09


def rows_of(store: KVStore, pages: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that a reader of layer 0 sees, float64 [Hkv, tokens, D]: hot rows where there are any, else the records."""
    records = store.records(0, pages)
    key, value = (rows.double() for rows in store.codec.open(0, records[0], records[1], records[2].nan_to_num()))
    levels = torch.from_numpy(store.hot.levels)[pages.cpu()]
    for level in set(levels.tolist()) - {0}:
        which = (levels == level).nonzero().flatten().to(pages.device)
        hot = store.hot.read(0, store.hot.blocks_of(pages[which].cpu().numpy(), level))
        masks = store.hot.row_masks[0, pages[which]]
        held = ((masks[..., None] >> torch.arange(PAGE_TOKENS, device=pages.device)) & 1).bool()
        assert (held.sum(-1) == level).all()
        for rows, codes, scale in ((key, hot.k, hot.k_scale), (value, hot.v, hot.v_scale)):
            mixed = rows[which]
            mixed[held] = dequantise_rows(codes, scale).double().flatten(0, 2)
            rows[which] = mixed
    flat = (rows.transpose(0, 1).flatten(1, 2)[:, :tokens] for rows in (key, value))
    return tuple(flat)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention in float64: query [T, Hq, D] at positions first.., key and value [Hkv, K, D]; out [T, Hq, D], lse [T, Hq]."""
    kv_heads, keys, dim = key.shape
    grouped = query.double().view(len(query), kv_heads, -1, dim)
    scores = torch.einsum("thgd,hkd->thgk", grouped, key) * scale
    positions = first + torch.arange(len(query), device=query.device)
    hidden = torch.arange(keys, device=query.device)[None] > positions[:, None]
    scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    out = torch.einsum("thgk,hkd->thgd", scores.softmax(-1), value)
    return out.reshape(query.shape), scores.logsumexp(-1).reshape(query.shape[:2])


def layer_cache(store: KVStore) -> tuple[torch.Tensor, ...]:
    """What the kernels take of layer 0."""
    base, hot = store.base, store.hot
    return base.k_codes[0], base.v_codes[0], base.scales[0], hot.k_rows[0], hot.v_rows[0], hot.scales[0], hot.row_masks[0]


def low_bits(store: KVStore) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Those of layer 0, where it is refined."""
    return (store.base.k_low[0], store.base.v_low[0]) if store.codec.refined else None


def sequences_of(store: KVStore, lengths: list[int], device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """req_to_token int32 [R, C] with pages that are not shared, and the pages of each sequence."""
    counts = [-(-length // PAGE_TOKENS) for length in lengths]
    pages = list((torch.arange(sum(counts)) + 1).to(device).split(counts))
    table = torch.zeros(len(lengths), max(counts) * PAGE_TOKENS, dtype=torch.int32, device=device)
    for row, each in zip(table, pages, strict=True):
        row[: len(each) * PAGE_TOKENS] = (each[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=device)).flatten()
    return table, pages


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the norm; an output that was not written counts as infinite."""
    return ((actual.double() - expected).norm() / expected.norm()).nan_to_num(math.inf).item()


def check_plan(lengths: list[int], pages_at: list[tuple[int, int, int, int]], parts: int, device: str = "cpu") -> None:
    """`_assign_parts` against its definition: shares with the least largest cost of a part; `pages_at` levels 32, 8, 4, 2."""
    from oscar_radix.kernels.decode_plan import HOT_TILE_COST, PROGRAM_TILES, DecodePlan, assign_parts

    costs = []
    for length, (whole, eights, fours, twos) in zip(lengths, pages_at, strict=True):
        records = -(-length // PAGE_TOKENS) - whole
        tiles = whole - (-eights // 4) - (-fours // 8) - (-twos // 16)
        costs.append(records + HOT_TILE_COST.value * tiles)
    shares = lambda most: [-(-cost // most) for cost in costs]  # noqa: E731
    most = next(most for most in range(PROGRAM_TILES.value, max(costs) + 4) if sum(shares(most)) <= parts)
    plan = DecodePlan.empty(len(lengths), 1, 1, parts, torch.device(device))
    plan.counts.copy_(torch.tensor(pages_at))
    plan.requests.fill_(-7)
    assign_parts(torch.tensor(lengths, device=device), plan)
    assert plan.starts.diff().tolist() == shares(most)
    owners = [request for request, share in enumerate(shares(most)) for _ in range(share)]
    assert plan.requests.tolist() == owners + [-1] * (parts - len(owners))


def check_decode(
    geometry: Geometry,
    lengths: list[int],
    parts: int,
    rotate: bool,
    device: str = "cpu",
    levels: tuple[int, ...] = LEVELS,
    refined: tuple[int, ...] = (),
) -> None:
    """`decode` of one new token a sequence; the last page of a sequence that does not fill it is whole."""
    from oscar_radix.kernels.decode import decode
    from oscar_radix.kernels.decode_plan import DecodePlan, plan_decode

    count = sum(-(-length // PAGE_TOKENS) for length in lengths)
    store = random_store(geometry, count, seed=parts, device=device, levels=levels, refined=refined)
    table, pages = sequences_of(store, lengths, device)
    for length, each in zip(lengths, pages, strict=True):
        last = int(each[-1])
        if length % PAGE_TOKENS and store.hot.levels[last] < PAGE_TOKENS:
            if store.hot.levels[last]:
                store.hot.release(last)
            assert store.hot.acquire(last)
            store.hot.scales[:, store.hot.block_table[last].astype("int64")] = 0.005
    store.hot.sync_tables()
    draw = torch.Generator().manual_seed(1)
    query = torch.randn(len(lengths), geometry.query_heads, geometry.head_dim, generator=draw).to(device)
    where = (table, torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    longest = max(len(each) for each in pages)
    plan = DecodePlan.empty(len(lengths), longest, longest, parts, torch.device(device))
    for each in (plan.pages, plan.hot, plan.counts, plan.starts, plan.requests):
        each.fill_(-7)
    plan_decode(where, store.hot.device_levels, plan)
    table.fill_(-(10**6))  # what a server writes there from now on is of later steps
    slots = parts + len(lengths)
    shapes = ((geometry.query_heads, slots, geometry.head_dim), (geometry.query_heads, slots))
    poison = tuple(torch.full(shape, math.nan, device=device) for shape in shapes)
    out, lse = torch.full_like(query, math.nan), torch.full(query.shape[:2], math.nan, device=device)
    codec = store.codec
    values = codec.value_parameters(0)
    decode(
        query,
        layer_cache(store),
        store.hot.device_block_table,
        codec.key_parameters(0),
        values,
        where[2],
        plan,
        poison,
        out,
        SCALE,
        rotate,
        lse,
        low_bits(store),
    )
    for request, length in enumerate(lengths):
        key, value = rows_of(store, pages[request], length)
        expected, expected_lse = attention(query[request : request + 1], key, value, SCALE, length - 1)
        rotation, mean = (each.double().repeat_interleave(geometry.group, 0) for each in values)
        expected = (torch.einsum("thc,hec->the", expected, rotation) if rotate else expected) + mean
        error = error_of(out[request : request + 1], expected)
        assert error < 2e-3, f"{geometry}, {length} tokens, {parts} parts: relative error {error:.1e}"
        assert (lse[request] - expected_lse[0]).abs().max() < 2e-2


def check_write(
    geometry: Geometry, tokens: int, decode: bool, rotate: bool, device: str = "cpu", refined: tuple[int, ...] = ()
) -> None:
    """`write_prefill` or `write_decode` of new tokens, some of them to pages without hot blocks, then `seal`; one row is NaN."""
    from oscar_radix.kernels.seal import seal
    from oscar_radix.kernels.write import write_decode
    from oscar_radix.kernels.write_prefill import PrefillRows, write_prefill

    store = random_store(geometry, 6, seed=tokens, device=device, levels=(0, 32), refined=refined)
    codec, hot, bad = store.codec, store.hot, torch.zeros(1, dtype=torch.int32, device=device)
    q, k, v = (each.to(device) for each in random_qkv(geometry, tokens, torch.Generator().manual_seed(3)))
    slots = (torch.arange(tokens, device=device) * 7 + 3) % (6 * PAGE_TOKENS) + PAGE_TOKENS
    k[0, 0, 5] = math.nan
    parameters = codec.basis_parameters(0)
    if not rotate:
        parameters = (*parameters[:4], torch.full_like(parameters[4], math.nan))
    rows = hot.k_rows[0], hot.v_rows[0], hot.scales[0]
    value = codec.values_to_basis(0, v) if rotate else v.float() - codec.value_mean[0]
    if decode:
        query = torch.full(q.shape, math.nan, device=device)
        write_decode(q, k, v, slots, parameters, rows, hot.device_block_table, query, bad, rotate)
    else:
        own = tuple(torch.full(k.shape, math.nan, dtype=torch.float16, device=device) for _ in range(2))
        written = PrefillRows.empty(tuple(q.shape), own)
        written.query.fill_(math.nan)
        written.int8[2].fill_(math.nan)
        write_prefill(q, k, v, slots, parameters, rows, hot.device_block_table, written, 0.5, bad, rotate)
        query, kept = written.query, written.int8
        expected = codec.keys_to_basis(0, k)
        expected[0, 0] = 0.0
        for half, whole, int8, which in ((own[0], expected, kept[0], 0), (own[1], value, kept[1], 1)):
            assert error_of(half, whole.double()) < 1e-3
            assert error_of(dequantise_rows(int8, kept[2][..., which]), whole.double()) < 2e-2
    assert bad.item() == 1
    assert error_of(query, codec.queries_to_basis(0, q).double() * (1.0 if decode else 0.5)) < 1e-3
    key = codec.keys_to_basis(0, k)
    for token, slot in enumerate(slots.tolist()):
        block = int(hot.block_table[slot // PAGE_TOKENS, slot % PAGE_TOKENS // 2])
        if block >= 0 and token:
            stored = dequantise_rows(hot.k_rows[0, block, :, slot % 2], hot.scales[0, block, :, slot % 2, 0])
            assert error_of(stored, key[token].double()) < 2e-2
            stored = dequantise_rows(hot.v_rows[0, block, :, slot % 2], hot.scales[0, block, :, slot % 2, 1])
            assert error_of(stored, value[token].double()) < 2e-2
    whole = torch.from_numpy(store.table.owner[1:] * 0 + (hot.levels[1:] == PAGE_TOKENS)).nonzero().flatten() + 1
    pages = whole.to(device)
    held = hot.read(0, hot.blocks_of(whole.numpy(), PAGE_TOKENS))
    expected = codec.seal(0, held.k, held.k_scale.nan_to_num(), held.v, held.v_scale.nan_to_num())
    records = store.base.k_codes[0], store.base.v_codes[0], store.base.scales[0]
    hot.scales.nan_to_num_()
    seal(pages, rows, records, codec.seal_parameters(0), hot.device_block_table, low=low_bits(store))
    for actual, wanted in zip(store.records(0, pages), expected, strict=True):
        assert torch.equal(actual, wanted)


def main() -> None:
    """The cases of the interpreter: one warp at a time, so a few pages. On a GPU, the same sizes for a memory checker."""
    from tests.kernels.extend_cases import check_extend, check_open

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        _emulate()
    check_plan([31500, 33, 1, 4000], [(0, 3, 8, 900), (2, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 0)], parts=20, device=device)
    check_plan([700] * 3, [(5, 5, 5, 0)] * 3, parts=264, device=device)
    check_plan([64], [(0, 1, 0, 0)], parts=2, device=device)
    check_decode(Geometry(1, 1, 4, 128), [150, 33], parts=6, rotate=True, device=device)
    check_decode(Geometry(1, 2, 6, 64), [100, 1], parts=9, rotate=False, device=device)
    check_decode(Geometry(1, 1, 4, 64), [95, 40], parts=2, rotate=False, device=device)
    check_decode(Geometry(1, 1, 10, 64), [70], parts=2, rotate=False, device=device)
    check_decode(Geometry(1, 1, 2, 128), [96], parts=2, rotate=False, device=device, levels=(0,))
    check_decode(Geometry(1, 1, 2, 64), [64], parts=2, rotate=False, device=device, levels=(32,))
    check_decode(Geometry(1, 1, 4, 128), [100, 33], parts=5, rotate=False, device=device, refined=(0,))
    check_decode(Geometry(1, 2, 6, 64), [70], parts=3, rotate=True, device=device, refined=(0,))
    check_extend(Geometry(1, 1, 4, 128), [100, 0], [40, 3], splits=1, device=device)
    check_extend(Geometry(1, 2, 6, 64), [70, 160], [5, 37], splits=3, device=device)
    check_extend(Geometry(1, 1, 4, 128), [70], [9], splits=2, device=device, refined=(0,))
    check_open(Geometry(1, 2, 6, 64), [70, 1, 33], device=device)
    check_open(Geometry(1, 1, 4, 64), [70], device=device, refined=(0,))
    check_open(Geometry(1, 1, 4, 128), [100], device=device)
    check_write(Geometry(1, 1, 2, 64), 20, decode=False, rotate=True, device=device)
    check_write(Geometry(1, 2, 4, 64), 9, decode=True, rotate=False, device=device)
    check_write(Geometry(1, 1, 2, 64), 20, decode=False, rotate=True, device=device, refined=(0,))
    if device == "cpu":
        check_conversation()
    print("done")


def check_conversation() -> None:
    """The whole backend, prefill, chunks and decode, beside the specification; for a GPU see test_triton_gpu."""
    from tests.kernels.pair import Pair

    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=1)
    pair = Pair(Geometry(1, 1, 2, 64), "tck", lengths=[140, 45], hot_pages=6, device="cpu", refined=(0,))
    pair.step({0: 70, 1: 31})
    pair.step({0: 50})
    for _ in range(6):
        pair.step({0: 1, 1: 1}, decode=True)
    pair.step({0: 9})
    pair.step({0: 1}, decode=True)


def _emulate() -> None:
    from oscar_radix.kernels import decode_hot, decode_records, extend, fine_codes, online_softmax, open_rows, operands, record_words
    from tests.kernels import operand_emulation, warp_emulation

    mend_interpreter()
    warp_emulation.emulate(decode_records, decode_hot, online_softmax, record_words, fine_codes)
    operand_emulation.emulate(operands, open_rows, extend)


if __name__ == "__main__":
    main()
