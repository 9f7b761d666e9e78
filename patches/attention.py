"""SGLang's attention backend interface over ours: a forward batch becomes sequences, a layer call becomes `run`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from oscar_radix.attention.backend import TorchAttention
from oscar_radix.attention.mass import MassSample
from oscar_radix.attention.plan import WritePlan, plan_decode, plan_forward, plan_writes
from oscar_radix.attention.sampling import MassSampling
from oscar_radix.calibration.moments import MomentAccumulator
from oscar_radix.kernels.attend import attend
from oscar_radix.patches.fold_values import prepare_to_fold
from oscar_radix.patches.forward_pages import ForwardPages
from oscar_radix.patches.refusals import Refused
from oscar_radix.patches.runtime import Runtime, refuse_unbuilt
from oscar_radix.pool.upload import upload_all
from oscar_radix.sequence import Sequence


class OscarAttentionBackend(AttentionBackend):
    """Plans in `init_forward_metadata`, runs in `forward_extend` and `forward_decode`.

    On a CPU everything is plain torch. On CUDA decode reads SGLang's own tables at fixed addresses, so that its CUDA graphs replay;
    the hot pool is brought up to date before each replay, outside the graph. No step waits for the device: the pages of a forward are
    known on the host, and what the device needs is sent in copies that the host does not wait for.
    """

    needs_cpu_seq_lens = True

    def __init__(self, runner: Any, runtime: Runtime):
        super().__init__()
        refuse_unbuilt(store=runtime.store)
        _refuse_layers(runner.model)
        prepare_to_fold(runtime.store.codec, runner.model, runner.server_args)
        self.runtime = runtime
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.pages = ForwardPages(runner.req_to_token_pool, runtime.store.requests)
        self.first_layer = runner.token_to_kv_pool.start_layer
        self.on_cpu = runtime.store.device.type == "cpu"
        if self.on_cpu:
            runtime.attention = TorchAttention(runtime.store)
        else:
            from oscar_radix.attention.triton_backend import TritonAttention

            runtime.attention = TritonAttention(runtime.store, runner.req_to_token_pool.size, self.req_to_token.shape[1])
        self.sampling = MassSampling(runtime.store) if runtime.store.mass else None
        if self.sampling:
            runtime.attention.sample = self.sampling.every_decode_step()
        self.plan: Any = None
        self.moments: MomentAccumulator | None = None

    # Plan ------------------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Lay out an eager forward; precision changes happen here, between forwards."""
        if forward_batch.forward_mode.is_idle():
            self.plan = None
            return
        self._end_sample()
        store = self.runtime.store
        if forward_batch.forward_mode.is_decode():
            if self.on_cpu:
                step = self.pages.decode(forward_batch)
                self.plan = plan_decode(store, step)
                self.runtime.attention.sample = self._sample(True, step.sequences)
            else:
                self._prepare_decode(forward_batch)
                self._plan_decode(forward_batch)
        else:
            sequences = self.pages.extend(forward_batch)
            if self.on_cpu:
                self.plan = plan_forward(store, sequences)
                self.runtime.attention.sample = self._sample(False, lambda: sequences)
            else:
                self._plan_extend(forward_batch, sequences)
        self.runtime.log_periodically()

    def _sample(self, decode: bool, sequences: Callable[[], list[Sequence]], padded: int = 0) -> MassSample | None:
        """What the attention of this forward is to keep, if it is one of those that are sampled."""
        return self.sampling.begin(sequences() if self.sampling.wanted(decode) else [], padded) if self.sampling else None

    def _end_sample(self) -> None:
        """Add the mass of the forward before: before anything changes levels, and without a hook behind the replay of a graph."""
        if self.sampling:
            self.sampling.end()

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a decode graph is captured or replayed. Padding rows have one token in page 0 and are not planned."""
        if not in_capture:
            self._end_sample()
            self._prepare_decode(forward_batch)
            self.runtime.log_periodically()
        self._plan_decode(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing: buffers of all batch sizes exist from the start."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Tokens of a padding row."""
        return 1

    def _prepare_decode(self, forward_batch: Any) -> None:
        """Hot pool and sample of a decode step on CUDA; what the device plans follows in `_plan_decode`."""
        step = self.pages.decode(forward_batch)
        self.runtime.store.residency.prepare_decode(step)
        self._sample(True, step.sequences, len(forward_batch.req_pool_indices))

    def _plan_decode(self, forward_batch: Any) -> None:
        from oscar_radix.attention.triton_backend import DecodeBatch

        self.plan = DecodeBatch(self.req_to_token, forward_batch.req_pool_indices, forward_batch.seq_lens, forward_batch.out_cache_loc)
        self.runtime.attention.prepare_decode(self.plan)

    def _plan_extend(self, forward_batch: Any, sequences: list[Sequence]) -> None:
        lengths = [sequence.seq_len - sequence.prefix_len for sequence in sequences]
        layout = np.array([[sequence.prefix_len for sequence in sequences], np.cumsum([0, *lengths[:-1]]), lengths], dtype=np.int64)
        attention = self.runtime.attention
        plan = attention.plan_extend([sequence.prefix_len for sequence in sequences], lengths)
        writes = plan_writes(self.runtime.store, sequences)
        attention.prefill_sample = self._sample(False, lambda: sequences)
        rows = attention.prefill_sample.rows(lengths) if attention.prefill_sample else np.zeros((0, 1), dtype=np.int64)
        parts = [part.numpy() for part in plan.tensors()]
        sent = upload_all([*writes, layout, rows, *parts], self.req_to_token.device)
        write, layout, rows = sent[: len(writes)], sent[len(writes)], sent[len(writes) + 1]
        where = (self.req_to_token, forward_batch.req_pool_indices, *layout.unbind())
        plan = plan.on(sent[len(writes) + 2 :])
        self.plan = attention.extend_batch(WritePlan(*write), forward_batch.out_cache_loc, where, plan, rows)

    # Run -------------------------------------------------------------------------------------------------------------

    def forward_extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """Prefill tokens: against cached pages and, causally, against their own chunk."""
        return self._forward(q, k, v, layer, save_kv_cache, "extend")

    def forward_decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """One new token a sequence, read back from the cache like all others."""
        return self._forward(q, k, v, layer, save_kv_cache, "decode")

    def _forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, save_kv_cache: bool, mode: str
    ) -> torch.Tensor:
        if k is None or v is None or not save_kv_cache:
            raise NotImplementedError(f"layer {layer.layer_id} shares another layer's KV cache, which --kv-quant oscar does not support")
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        key = k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim)
        value = v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim)
        index = layer.layer_id - self.first_layer
        if self.moments is not None:
            out = self._calibrate(index, query, key, value, layer.scaling)
        else:
            if self.sampling:
                self.sampling.scale = layer.scaling
            run = self.runtime.attention.run if self.on_cpu else getattr(self.runtime.attention, mode)
            out = run(index, query, key, value, self.plan, layer.scaling)
        return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _calibrate(self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Exact causal attention of one sequence that is not cached; its moments are added up."""
        self.moments.add(index, query, key, value, scale)
        causal = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device).tril()
        out, _ = attend(query.float(), key.float().transpose(0, 1), value.float().transpose(0, 1), scale, causal)
        return out.to(query.dtype)

    def support_triton(self) -> bool:
        """Whether SGLang may use its own Triton kernels to fill its tables."""
        return not self.on_cpu


def _refuse_layers(model: torch.nn.Module) -> None:
    for name, layer in model.named_modules():
        if not isinstance(layer, RadixAttention):
            continue
        if layer.logit_cap:
            raise Refused(f"--kv-quant oscar: {name} caps its attention scores at {layer.logit_cap}; serve it without --kv-quant")
        if layer.sliding_window_size > -1:
            raise Refused(f"--kv-quant oscar: {name} has a sliding window of {layer.sliding_window_size}; serve it without --kv-quant")
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            raise Refused(f"--kv-quant oscar: {name} is not causal self-attention; serve it without --kv-quant")
