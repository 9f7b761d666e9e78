"""Pure parts of `benchmarks.quality`: bytes, choice of rows, scoring, readers that share a prefix; random data and a tiny random model."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality import grid
from benchmarks.quality.__main__ import finite
from benchmarks.quality.bits import MASK_BYTES, effective_bits, record_bytes, row_bytes
from benchmarks.quality.grid import EVEN, MEASURED, Cell
from benchmarks.quality.measure import Fitted, measure
from benchmarks.quality.plot import draw
from benchmarks.quality.reading import LAST_QUERIES, NEAREST, Readers, compute_prefix
from benchmarks.quality.recall import shared_tasks
from benchmarks.quality.rows import PrefixRows, int4_rows
from benchmarks.quality.scoring import mean_and_error, paired_difference, paired_ratio, score
from benchmarks.quality.selection import BUDGET_LEVELS, GRANULARITIES, choose
from benchmarks.quality.summary import bits_of, by_length, lines, recall_report, text_report
from benchmarks.quality.texts import Shared, shared_texts
from benchmarks.quality.uniform_keys import UniformKeys, water_filled
from oscar_radix.calibration.collect import accumulate
from oscar_radix.codec import get_recipe
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.base_records import BaseRecords
from oscar_radix.pool.hot_pool import HotPool
from tests.helpers import GEOMETRY

LAYERS, HEADS, PREFIX = 2, 1, 448


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=HEADS, head_dim=64,
        vocab_size=97, max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def moments(model):
    return accumulate(model, torch.randint(0, 97, (1024,), generator=torch.Generator().manual_seed(1)).tolist()).finish()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 97, (PREFIX + 4 * 8,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def prefix(model, ids):
    return compute_prefix(model, ids[:PREFIX], LAYERS, HEADS)


@pytest.mark.parametrize("recipe", ["tck", EVEN, "oscar"])
@pytest.mark.parametrize("layers", [2, 30])
@pytest.mark.parametrize("rows", [0, 2, 8])
def test_bits_are_those_of_the_store(recipe, layers, rows):
    geometry = dataclasses.replace(GEOMETRY, layers=layers)
    layout, refined = MEASURED[recipe].layout(geometry.head_dim), MEASURED[recipe].refined_layers(layers)
    assert refined == (2 if (recipe, layers) == ("tck", 30) else 0)
    page = BaseRecords.page_bytes(geometry, layout, refined) + rows // 2 * HotPool.block_bytes(geometry)
    page += geometry.layers * geometry.kv_heads * MASK_BYTES
    cell = Cell(recipe, "attention" if rows else "none", rows)
    middle, whole = bits_of(cell, geometry, [2048])
    assert middle == pytest.approx(8 * page / (PAGE_TOKENS * geometry.kv_elements_per_token))
    record = BaseRecords.page_bytes(geometry, layout, refined) / (PAGE_TOKENS * layers * geometry.kv_heads)
    always = effective_bits(record, geometry.head_dim, 1.0, 8)
    assert whole == pytest.approx(always * 320 / 2048 + middle * 1728 / 2048)


def test_bits_of_keys_and_of_int4_rows():
    layout = get_recipe("tck").layout(64)
    assert record_bytes(layout, 64, 3.0) - record_bytes(layout, 64) == 64 / 8
    assert row_bytes(64, 8) - row_bytes(64, 4) == 64


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_spends_the_same(granularity):
    scores = torch.rand(3, 2, 16 * PAGE_TOKENS, generator=torch.Generator().manual_seed(0)) ** 4
    for rows in (2, 4, 8):
        chosen = choose("attention", scores, rows, granularity)
        assert chosen.shape == scores.shape
        assert int(chosen.sum()) == scores.numel() * rows // PAGE_TOKENS


def test_page_granularity_takes_the_largest_of_each_page():
    scores = torch.zeros(1, 1, 2 * PAGE_TOKENS)
    scores[0, 0, [3, 7, 40, 63]] = torch.tensor([1.0, 2.0, 0.5, 0.1])
    assert choose("attention", scores, 2)[0, 0].nonzero().flatten().tolist() == [3, 7, 40, 63]
    assert choose("attention", scores, 2, "prefix")[0, 0].nonzero().flatten().tolist()[:3] == [3, 7, 40]


def test_budgets_go_where_the_score_is():
    scores = torch.rand(2, 1, 4 * PAGE_TOKENS, generator=torch.Generator().manual_seed(0))
    scores[1] *= 1000
    counts = choose("attention", scores, 4, "layer-budget").unflatten(-1, (-1, PAGE_TOKENS)).sum(-1)
    assert counts[0].unique().tolist() == [0]
    assert counts[1].unique().tolist() == [8]
    assert set(counts.flatten().tolist()) <= set(BUDGET_LEVELS)


def test_controls():
    scores = torch.zeros(2, 2, 4 * PAGE_TOKENS)
    assert choose("none", scores, 8).sum() == 0
    assert choose("window", scores, 8)[0, 0].nonzero().flatten().tolist() == list(range(96, 128))
    draw = choose("random", scores, 4)
    assert (draw.unflatten(-1, (-1, PAGE_TOKENS)).sum(-1) == 4).all()
    assert not torch.equal(draw[0, 0], draw[1, 0])


def test_scoring_by_hand():
    exact = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    got = torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log()
    scores = score(exact, got, torch.tensor([[0, 1]]))
    assert scores.kl[0].tolist() == pytest.approx([0.5 * torch.log(torch.tensor(4 / 3)).item(), 0.0], abs=1e-6)
    assert scores.same[0].tolist() == [0.0, 1.0]
    assert scores.rise[0, 0] == pytest.approx(torch.log(torch.tensor(2 / 3)).item(), abs=1e-6)
    assert scores.hit[0, 0] == 1.0
    assert scores.rise[0, 1].isnan()


def test_errors_over_readers():
    assert mean_and_error(torch.tensor([1.0, 3.0])) == (2.0, 1.0)
    ours, theirs = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 6.0, 9.0])
    assert paired_ratio(theirs, ours) == pytest.approx((3.0, 3.0, 3.0))
    assert paired_difference(theirs, ours)[0] == 4.0


def test_readers_do_not_see_each_other(model, ids, prefix):
    readers = ids[PREFIX:].view(4, 8)
    together = Readers(model, readers, PREFIX).read(lambda layer: (prefix.keys[layer], prefix.values[layer]))
    for reader, got in zip(readers, together, strict=True):
        with torch.inference_mode():
            alone = model(torch.cat((ids[:PREFIX], reader)).unsqueeze(0)).logits[0, PREFIX:].log_softmax(-1)
        torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)


def test_mass_counts_every_query_once(prefix):
    # All of a query's probability, but for its own page's worth of nearest tokens.
    group = 2
    assert (prefix.own.first.sum(-1) < group * PREFIX).all()
    assert (prefix.last.first.sum(-1) <= group * LAST_QUERIES + 1e-3).all()
    assert (prefix.last.first.sum(-1) > 0.5 * group * LAST_QUERIES).all()
    assert prefix.own.first[..., PREFIX - NEAREST :].sum() == 0
    assert (prefix.own.second <= prefix.own.first + 1e-6).all()


def test_mass_of_readers(model, ids, prefix, moments):
    fitted = Fitted.of("tck", moments, "cpu")
    rows = PrefixRows(fitted.codec, fitted.calibration, prefix.keys, prefix.values)
    mass = Readers(model, ids[PREFIX:].view(4, 8), PREFIX).mass(rows.cold.__getitem__, rows.hot.__getitem__, fitted.codec, LAYERS, HEADS)
    assert (mass.first.sum(-1) <= 2 * 32).all()
    assert (mass.first.sum(-1) > 0.9 * 2 * 32).all()
    assert (mass.need >= 0).all()


def test_formats_are_in_order_of_their_bits(prefix, moments):
    fitted = Fitted.of("tck", moments, "cpu")
    rows = PrefixRows(fitted.codec, fitted.calibration, prefix.keys, prefix.values)
    for part in (0, 1):
        whole = rows.hot[0][part]
        errors = [float((x[0][part] - whole).square().mean()) for x in (rows.cold, rows.format("int4"), rows.hot)]
        assert errors[0] > errors[1] > errors[2] == 0
    everything = torch.ones(PREFIX, dtype=torch.bool)
    nothing = torch.zeros(HEADS, PREFIX, dtype=torch.bool)
    torch.testing.assert_close(rows.mixed(0, everything, nothing), rows.hot[0])
    torch.testing.assert_close(rows.mixed(0, ~everything, nothing), rows.cold[0])
    torch.testing.assert_close(rows.mixed(0, ~everything, ~nothing, "int4"), rows.format("int4")[0])


def test_int4_rows():
    y = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    read = int4_rows(y)
    assert all(len(row.unique()) <= 15 for row in read)
    assert float((read - y).square().mean()) < 0.02
    assert int4_rows(torch.zeros(2, 64)).abs().max() == 0


def test_water_filling():
    widths = water_filled(torch.tensor([[100.0, 1.0, 1.0, 1e-6]], dtype=torch.float64), 2.0)
    assert widths.sum() == 8
    assert widths[0].tolist() == sorted(widths[0].tolist(), reverse=True)
    assert widths[0, 3] == 0


def test_uniform_keys_at_two_bits_are_like_records(prefix, moments):
    fitted = Fitted.of("tck", moments, "cpu")
    rows = PrefixRows(fitted.codec, fitted.calibration, prefix.keys, prefix.values)
    errors = {}
    for bits in (2.0, 2.5, 3.0):
        wrong = (UniformKeys(fitted.calibration, bits).through(0, rows.hot[0][0]) - rows.hot[0][0]).transpose(0, 1)
        errors[bits] = float(((wrong @ fitted.metric[0]) * wrong).sum())
    wrong = (rows.cold[0][0] - rows.hot[0][0]).transpose(0, 1)
    assert errors[2.0] == pytest.approx(float(((wrong @ fitted.metric[0]) * wrong).sum()), rel=0.15)
    assert errors[2.0] > errors[2.5] > errors[3.0]


def test_the_whole_measurement(model, moments, ids, tmp_path):
    readers = ids[PREFIX:].view(4, 8).tolist()
    shared = Shared("tiny", ids[:PREFIX].tolist(), readers[:2], readers[2:] * 2, ("next", "quote", "other document", "quote"))
    cells = [*grid.quick_cells(), Cell(policy="attention", rows=2, score="error"), Cell(EVEN, key_bits=3.25), Cell("oscar")]
    cells += [Cell(recipe, "attention", 2, granularity="server") for recipe in ("tck", EVEN)]
    fitted = {recipe: Fitted.of(recipe, moments, "cpu") for recipe in ("tck", EVEN, "oscar")}
    progress = []
    measured = measure(model, fitted, shared, cells, progress.append)
    assert len(progress) == len(cells)
    report = text_report([measured, dataclasses.replace(measured)], cells, GEOMETRY)
    assert report["positions"] == 2 * 2 * 8
    assert len(report["table"]) == len(cells)
    controls = {"window", "random", "uniform K 3.25", "default score and granularity", "no refined layers"}
    assert {entry["control"] for entry in report["comparisons"]} == controls
    assert len(report["targets"]) == 8, "KL, and ratios to window, random and uniform keys; by the page and as the server chooses"
    split = by_length([measured], cells, GEOMETRY)
    assert list(split["lengths"]) == [str(PREFIX)]
    assert len(lines(split)) == 1 + len(cells) + 8
    draw({"model": "tiny", "text": split}, tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").stat().st_size > 0
    covered = {row["policy"]: row["mass_covered"] for row in report["table"] if row["score"] == "mass" and row["recipe"] == "tck"}
    assert covered["attention"] > covered["random"] > covered["none"] == 0


def test_answers_only(model, moments, ids):
    readers = ids[PREFIX:].view(4, 8).tolist()
    scored = [[False] * 4 + [True] * 2 + [False] * 2] * 2
    shared = Shared("tiny", ids[:PREFIX].tolist(), readers[:2], readers[2:], ("copying",) * 2, scored)
    measured = measure(model, {"tck": Fitted.of("tck", moments, "cpu")}, shared, [Cell()], lambda line: None)
    report = recall_report([measured], [Cell()], GEOMETRY)
    assert report["answer_tokens"] == {"copying": 4}
    assert 0 <= report["table"][0]["copying"] <= 1


def test_on_a_miss_the_prompt_reads_int8(model, moments, ids):
    readers = ids[PREFIX:].view(4, 8).tolist()
    scored = [[False] * 4 + [True] * 3 + [False]] * 2
    shared = Shared("tiny", ids[:PREFIX].tolist(), readers[:2], readers[2:], ("copying",) * 2, scored)
    hit, miss, int8 = Cell(window=32), Cell(window=32, path="miss"), Cell(policy="window", rows=32, window=32)
    scores = measure(model, {"tck": Fitted.of("tck", moments, "cpu")}, shared, [hit, miss, int8], lambda line: None).scores
    assert torch.allclose(scores[miss].kl[:, :5], scores[int8].kl[:, :5], atol=1e-6), "the last of the prompt says the answer's first"
    assert (scores[miss].kl[:, 5:] > 2 * scores[int8].kl[:, 5:]).all()
    with pytest.raises(ValueError, match="tiny: its readers have no answers"):
        measure(model, {"tck": Fitted.of("tck", moments, "cpu")}, dataclasses.replace(shared, scored=None), [miss], lambda line: None)


def test_json_knows_no_infinity():
    assert finite({"a": [1.0, float("inf")], "b": float("nan")}) == {"a": [1.0, None], "b": None}


def test_recall_tasks_fit_pages_and_ask_for_other_lines():
    for shared in shared_tasks(lambda text: [ord(c) for c in text], [7], seeds={"key-value": 1, "copying": 1}):
        assert len(shared.prefix) % PAGE_TOKENS == 0
        assert shared.prefix[0] == 7
        assert {len(flags) for flags in shared.scored} == {len(reader) for reader in shared.evaluated}
        answers = [
            "".join(chr(token) for token, is_answer in zip(reader[1:], flags, strict=False) if is_answer)
            for reader, flags in zip(shared.evaluated, shared.scored, strict=True)
        ]
        given = ["".join(map(chr, giver)) for giver in shared.givers]
        assert all(answers)
        if shared.kinds[0] == "copying":
            assert not any(answer.strip() in giver for answer in answers for giver in given)


def test_text_readers_are_distinct():
    lengths = [256, 512]
    made = shared_texts(lambda text: [ord(c) for c in text], lengths, 32, [7])
    for shared, length in zip(made, lengths, strict=True):
        assert len(shared.prefix) == length
        assert shared.prefix[0] == 7
        readers = [tuple(reader) for reader in shared.givers + shared.evaluated]
        assert len(set(readers)) == len(readers)
        assert {len(reader) for reader in readers} == {32}
