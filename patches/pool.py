"""SGLang's face of the store: sizes and bytes; rows are written and read by the attention backend alone."""

from typing import Any, NoReturn

import torch
from sglang.srt.mem_cache.memory_pool import KVCache

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.store import KVStore


class OscarKVPool(KVCache):
    """A KVCache without dense buffers: whoever asks for one gets an error instead of wrong rows."""

    def __init__(self, store: KVStore, size: int, dtype: torch.dtype, device: str, start_layer: int, end_layer: int):
        super().__init__(
            size=size,
            page_size=PAGE_TOKENS,
            dtype=dtype,
            layer_num=store.geometry.layers,
            device=device,
            enable_memory_saver=False,
            start_layer=start_layer,
            end_layer=end_layer,
            allocation_label="oscar",
        )
        self.store = store
        self.head_num = store.geometry.kv_heads
        self.head_dim = store.geometry.head_dim
        self.v_head_dim = store.geometry.head_dim
        self._finalize_allocation_log(size)

    def get_kv_size_bytes(self) -> int:
        """Bytes of all buffers, hot pool and tables included."""
        return sum(self.store.allocated_bytes.values())

    def get_v_head_dim(self) -> int:
        """Head dim of V."""
        return self.v_head_dim

    def get_key_buffer(self, layer_id: int) -> NoReturn:
        """There is none."""
        _no_dense_rows("get_key_buffer")

    def get_value_buffer(self, layer_id: int) -> NoReturn:
        """There is none."""
        _no_dense_rows("get_value_buffer")

    def get_kv_buffer(self, layer_id: int) -> NoReturn:
        """There is none."""
        _no_dense_rows("get_kv_buffer")

    def set_kv_buffer(self, layer: Any, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor, *args: Any) -> NoReturn:
        """Rows enter through the attention backend, which knows their pages."""
        _no_dense_rows("set_kv_buffer")


def _no_dense_rows(caller: str) -> NoReturn:
    raise NotImplementedError(
        f"{caller}: with --kv-quant oscar the KV cache has no dense rows, so this feature cannot use it; serve without --kv-quant"
    )
