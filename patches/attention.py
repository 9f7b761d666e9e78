"""SGLang's attention backend interface over ours: a forward batch becomes sequences, a layer call becomes `run`."""

from typing import Any

import torch
from oscar_radix.kernels.attend import attend
from oscar_radix.patches.refusals import Refused
from oscar_radix.patches.runtime import Runtime
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from oscar_radix.attention.backend import TorchAttention
from oscar_radix.attention.plan import ForwardPlan, plan_forward
from oscar_radix.calibration.moments import MomentAccumulator
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.sequence import Sequence


class OscarAttentionBackend(AttentionBackend):
    """Plans in `init_forward_metadata`, runs in `forward_extend` and `forward_decode`."""

    needs_cpu_seq_lens = True

    def __init__(self, runner: Any, runtime: Runtime):
        super().__init__()
        _refuse_layers(runner.model)
        self.runtime = runtime
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.first_layer = runner.token_to_kv_pool.start_layer
        runtime.attention = TorchAttention(runtime.store)
        self.plan: ForwardPlan | None = None
        self.moments: MomentAccumulator | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Lay out the forward; precision changes happen here, between forwards."""
        if forward_batch.forward_mode.is_idle():
            self.plan = None
            return
        self.plan = plan_forward(self.runtime.store, self._sequences(forward_batch))
        self.runtime.log_periodically()

    def _sequences(self, forward_batch: Any) -> list[Sequence]:
        lengths = forward_batch.seq_lens_cpu.tolist()
        decode = forward_batch.forward_mode.is_decode()
        prefixes = [length - 1 for length in lengths] if decode else list(forward_batch.extend_prefix_lens_cpu)
        rows = forward_batch.req_pool_indices.tolist()
        sequences = []
        for row, prefix, length in zip(rows, prefixes, lengths, strict=True):
            slots = self.req_to_token[row, :length:PAGE_TOKENS]
            sequences.append(Sequence((slots // PAGE_TOKENS).cpu().numpy().astype("int64"), int(prefix), int(length), decode))
        return sequences

    def forward_extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """Prefill tokens: against cached pages and, causally, against their own chunk."""
        return self._forward(q, k, v, layer, save_kv_cache)

    def forward_decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """One new token a sequence, read back from the cache like all others."""
        return self._forward(q, k, v, layer, save_kv_cache)

    def _forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, save_kv_cache: bool) -> torch.Tensor:
        if k is None or v is None or not save_kv_cache:
            raise NotImplementedError(f"layer {layer.layer_id} shares another layer's KV cache, which --kv-quant oscar does not support")
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        key = k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim)
        value = v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim)
        index = layer.layer_id - self.first_layer
        if self.moments is not None:
            out = self._calibrate(index, query, key, value, layer.scaling)
        else:
            out = self.runtime.attention.run(index, query, key, value, self.plan, layer.scaling)
        return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _calibrate(self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Exact causal attention of one sequence that is not cached; its moments are added up."""
        self.moments.add(index, query, key, value)
        causal = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device).tril()
        out, _ = attend(query.float(), key.float().transpose(0, 1), value.float().transpose(0, 1), scale, causal)
        return out.to(query.dtype)

    def support_triton(self) -> bool:
        """Slot arithmetic is plain torch."""
        return False


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
