"""A KV cache twice, one driven by the specification (plain torch), one by the Triton kernels."""

import numpy as np
import torch

from oscar_radix.attention.backend import TorchAttention
from oscar_radix.attention.mass import MassSample
from oscar_radix.attention.plan import plan_forward
from oscar_radix.codec import get_recipe
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.policy import RandomPolicy
from oscar_radix.pool.hot_pool import PAGE_BLOCKS
from oscar_radix.pool.store import KVStore
from oscar_radix.sequence import Sequence
from tests.helpers import make_codec, page_count, random_qkv, take_pages

SCALE = 0.1


class Pair:
    """The same cache twice: one driven by the specification, one by the kernels; `step` compares them."""

    def __init__(
        self,
        geometry: Geometry,
        recipe: str,
        lengths: list[int],
        hot_pages: int,
        level: int | None = None,
        device: str = "cuda",
        refined: tuple[int, ...] = (),
    ):
        from oscar_radix.attention.triton_backend import TritonAttention

        self.geometry, self.device = geometry, device
        self.draw = torch.Generator().manual_seed(3)
        self.stores = []
        for _ in range(2):
            policy = RandomPolicy()
            policy.level = policy.level if level is None else level
            layout, blocks = get_recipe(recipe).layout(geometry.head_dim), hot_pages * PAGE_BLOCKS
            store = KVStore(geometry, layout, 400, blocks, policy, 64, device, refined=len(refined))
            store.codec = make_codec(recipe, geometry, device, refined)
            base, hot = store.base, store.hot
            for buffer in (base.k_codes, base.v_codes, base.k_low, base.v_low, hot.k_rows, hot.v_rows):
                buffer.random_(0, 100)  # poison: nothing may be read that was not written
            self.stores.append(store)
        self.spec, self.ours = TorchAttention(self.stores[0]), TritonAttention(self.stores[1], max_requests=8, max_tokens=4096)
        self.pages = [take_pages(self.stores[0], page_count(length)) for length in lengths]
        for pages in self.pages:
            self.stores[1].allocate(pages)
        self.done = [0] * len(lengths)
        self.rows = torch.zeros(len(lengths), 4096, dtype=torch.int32, device=device)
        for row, pages in enumerate(self.pages):
            slots = (pages[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).reshape(-1)
            self.rows[row, : len(slots)] = torch.from_numpy(slots).int()

    def step(self, counts: dict[int, int], decode: bool = False) -> None:
        from oscar_radix.attention.triton_backend import DecodeBatch

        sequences, slots = [], []
        for i, count in counts.items():
            end = self.done[i] + count
            sequences.append(Sequence(self.pages[i][: page_count(end)], self.done[i], end, decode))
            slots.append(self.rows[i, self.done[i] : end])
            self.done[i] = end
        q, k, v = (x.to(self.device) for x in random_qkv(self.geometry, sum(counts.values()), self.draw))
        plans = [plan_forward(store, sequences) for store in self.stores]
        queries = 1 if decode else 7
        samples = [MassSample(store, None, len(counts), queries) for store in self.stores]
        self.spec.sample, self.ours.sample, self.ours.prefill_sample = samples[0], samples[1], samples[1]
        expected = self.spec.run(0, q, k, v, plans[0], SCALE)
        to = lambda values: torch.tensor(values, device=self.device)  # noqa: E731
        rows, slots = to(list(counts)), torch.cat(slots).long()
        if decode:
            batch = DecodeBatch(self.rows, rows, to([s.seq_len for s in sequences]), slots)
            self.ours.prepare_decode(batch)
            actual = self.ours.decode(0, q, k, v, batch, SCALE)
        else:
            lengths = list(counts.values())
            starts = np.cumsum([0, *lengths[:-1]]).tolist()
            where = (self.rows, rows, to([s.prefix_len for s in sequences]), to(starts), to(lengths))
            plan = self.ours.plan_extend([s.prefix_len for s in sequences], lengths)
            plan = plan.on([each.to(self.device) for each in plan.tensors()])
            batch = self.ours.extend_batch(plans[1].write, slots, where, plan, to(samples[1].rows(lengths)))
            actual = self.ours.extend(0, q, k, v, batch, SCALE)
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < 6e-3, f"relative error {error:.2e} at {counts}, decode {decode}"
        self.compare_records()
        self.compare_samples(*samples)

    def compare_samples(self, theirs: MassSample, ours: MassSample) -> None:
        """Layer 0's queries in the basis, which a prefill kernel holds in fp16, and their log-sum-exp; inf where there is no query."""
        counted = theirs.lse[0].isfinite()
        assert torch.equal(counted, ours.lse[0].isfinite())
        assert (theirs.lse[0] - ours.lse[0])[counted].abs().max() < 2e-2
        expected = theirs.query[0][counted]
        assert (ours.query[0][counted] - expected).norm() / expected.norm() < 2e-3

    def compare_records(self) -> None:
        """A row may differ by one int8 step: the basis change is float32 here, float64 in the specification."""
        theirs, ours = self.stores
        sealed = torch.from_numpy(np.flatnonzero(theirs.table.sealed)).to(self.device)
        assert np.array_equal(theirs.hot.levels, ours.hot.levels)
        for name, *pair in zip(("k_codes", "v_codes", "scales"), theirs.records(0, sealed), ours.records(0, sealed), strict=True):
            a, b = pair
            different = (a != b).float().mean().item() if len(sealed) else 0.0
            assert different <= 2e-3, f"{name}: {different:.2e} of the values differ"
