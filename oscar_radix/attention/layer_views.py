"""What the kernels take of one layer, so that a forward pass does not index every buffer of the store for every launch."""

from dataclasses import dataclass

from torch import Tensor

from oscar_radix.codec.stepped import SteppedCodec
from oscar_radix.pool.store import KVStore


@dataclass(frozen=True)
class LayerViews:
    """Views of one layer.

    hot_rows: k, v int8 [N, Hkv, 2, D], scales fp16 [N, Hkv, 2, 2]; records: k_codes, v_codes uint8 [P, Hkv, 32, D/4], scales fp16
    [P, Hkv, 32, 2]; cache: records, hot rows and row masks int32 [P, Hkv]; basis, keys, values, seal: the codec's parameters; low: of a
    refined layer, low bits of K and V, uint8 [P, Hkv, 32, D/4].
    """

    hot_rows: tuple[Tensor, ...]
    records: tuple[Tensor, ...]
    cache: tuple[Tensor, ...]
    basis: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    seal: tuple[Tensor, ...]
    low: tuple[Tensor, Tensor] | None

    @staticmethod
    def of(store: KVStore, codec: SteppedCodec, layer: int) -> "LayerViews":
        """Those of `layer`."""
        base, hot = store.base, store.hot
        records = (base.k_codes[layer], base.v_codes[layer], base.scales[layer])
        place = store.low_place(layer)
        hot_rows = (hot.k_rows[layer], hot.v_rows[layer], hot.scales[layer])
        return LayerViews(
            hot_rows,
            records,
            (*records, *hot_rows, hot.row_masks[layer]),
            codec.basis_parameters(layer),
            codec.key_parameters(layer),
            codec.value_parameters(layer),
            codec.seal_parameters(layer),
            None if place is None else (base.k_low[place], base.v_low[place]),
        )
