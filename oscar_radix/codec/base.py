"""The two interfaces of a KV codec: a recipe, and a recipe bound to a calibration."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from oscar_radix.codec.calibration import Calibration, CalibrationError
from oscar_radix.codec.layout import RecordLayout
from oscar_radix.codec.moments import Moments


class Codec(ABC):
    """One recipe bound to one calibration: all layers and KV heads of one tensor-parallel rank.

    Rows live "in the basis": keys as (k - mu_k) A, queries as q A^-T, values as (v - mu_v) R, so that scores are unchanged up to
    a constant per query. A basis change accumulates in float64 and is rounded once to float32; all reductions of `seal` are
    exact. So a row gets the same codes in whatever batch it comes.
    After `fold_values` the model's own weights hold R (`values_folded`): values come as v R, outputs leave as o + mu_v R.
    Shapes: T tokens, N pages, H KV heads, Hq query heads, D head dim.
    """

    layout: RecordLayout
    refined: tuple[int, ...] = ()
    """Layers whose codes come twice as long: those of a record, then as many bytes of low bits (`Recipe.refined_layers` of them)."""

    def __init__(self, calibration: Calibration, device: torch.device | str) -> None:
        self.recipe_name = calibration.recipe
        self.geometry = calibration.geometry
        self.device = torch.device(device)
        self.values_folded = False
        self._parameters: dict[str, Tensor] = {}
        tensors = calibration.tensors
        missing = {"key_basis", "query_basis", "key_mean", "value_mean", "value_rotation"} - tensors.keys()
        if missing:
            raise CalibrationError(f"the calibration of recipe '{calibration.recipe}' lacks the tensors {sorted(missing)}")
        self.key_basis = self._keep("key_basis", tensors["key_basis"].float())
        self.query_basis = self._keep("query_basis", tensors["query_basis"].float())
        self.key_mean = self._keep("key_mean", tensors["key_mean"].float())
        self.value_mean = self._keep("value_mean", tensors["value_mean"].float())
        self.value_rotation = self._keep("value_rotation", tensors["value_rotation"].float())

    def _keep(self, name: str, tensor: Tensor) -> Tensor:
        """Move a parameter to the device and count its bytes."""
        kept = tensor.to(self.device).contiguous()
        self._parameters[name] = kept
        return kept

    def fold_values(self) -> None:
        """The model's weights hold R from now on: value_rotation becomes the identity, value_mean mu_v R, at the same addresses.

        Only parameters change; weights are folded by whoever owns the model.

        Raises:
            CalibrationError: when this codec is folded already.
        """
        if self.values_folded:
            raise CalibrationError("the values of this codec are folded already; fold a codec once, right after it is made")
        mean = torch.einsum("lhd,lhde->lhe", self.value_mean.double(), self.value_rotation.double())
        self.value_mean.copy_(mean)
        self.value_rotation.copy_(torch.eye(self.geometry.head_dim, device=self.device))
        self.values_folded = True

    def assign(self, other: "Codec") -> None:
        """Take over the parameters of a codec of the same recipe and geometry, at the same addresses: captured CUDA graphs keep them.

        They do not keep which layers are refined: a codec that changes it is assigned before the capture.

        Raises:
            CalibrationError: when recipe, geometry or `values_folded` differ.
        """
        if (other.recipe_name, other.geometry) != (self.recipe_name, self.geometry):
            raise CalibrationError(
                f"a codec of recipe '{self.recipe_name}' and {self.geometry} cannot take the parameters of recipe '{other.recipe_name}' "
                f"and {other.geometry}"
            )
        if other.values_folded != self.values_folded:
            sides = [("folded" if codec.values_folded else "unfolded") for codec in (self, other)]
            raise CalibrationError(
                f"a codec with {sides[0]} values cannot take the parameters of one with {sides[1]} values, because captured CUDA graphs "
                "rely on it; call fold_values on both or on none"
            )
        self.refined = other.refined
        for name, tensor in self._parameters.items():
            tensor.copy_(other._parameters[name])

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameter tensors that this codec holds on its device."""
        return sum(t.numel() * t.element_size() for t in self._parameters.values())

    def keys_to_basis(self, layer: int, k: Tensor) -> Tensor:
        """Post-RoPE keys [T, H, D], any float dtype, to float32 [T, H, D]: (k - mu_k) A."""
        return _times(k.double() - self.key_mean[layer].double(), self.key_basis[layer])

    def values_to_basis(self, layer: int, v: Tensor) -> Tensor:
        """Values [T, H, D], any float dtype, to float32 [T, H, D]: (v - mu_v) R."""
        centred = v.double() - self.value_mean[layer].double()
        return centred.float() if self.values_folded else _times(centred, self.value_rotation[layer])

    def queries_to_basis(self, layer: int, q: Tensor) -> Tensor:
        """Post-RoPE queries [T, Hq, D] to float32 [T, Hq, D]: q_b . y = q . (k - mu_k)."""
        return self._per_group(q, self.query_basis[layer]).float()

    def output_from_basis(self, layer: int, o: Tensor) -> Tensor:
        """Attention output in the value basis, float32 [T, Hq, D], to the model's: o R^T + mu_v, float32 (weights sum to 1)."""
        rotated = o.double() if self.values_folded else self._per_group(o, self.value_rotation[layer].mT)
        return (rotated + self.value_mean[layer].double().repeat_interleave(self.geometry.group, 0)).float()

    def _per_group(self, x: Tensor, matrices: Tensor) -> Tensor:
        """float64 [T, Hq, D]: every query head times the matrix [H, D, D] of its KV head."""
        grouped = x.double().unflatten(1, (self.geometry.kv_heads, self.geometry.group))
        return torch.einsum("thgd,hde->thge", grouped, matrices.double()).flatten(1, 2)

    @abstractmethod
    def seal(self, layer: int, k_rows: Tensor, k_scale: Tensor, v_rows: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """2-bit records of int8 rows [N, H, T, D] with fp16 scales [N, H, T].

        Returns uint8 K codes [N, H, T, layout.k_code_bytes], uint8 V codes [N, H, T, layout.v_code_bytes], both twice as long in a
        refined layer, and fp16 scales [N, H, T, layout.scale_count].
        """

    @abstractmethod
    def open(self, layer: int, k_codes: Tensor, v_codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `seal` up to the quantisation error: K and V in the basis, float32 [N, H, T, D]."""


class Recipe(ABC):
    """A named way to choose bases and to code rows."""

    name: str

    @abstractmethod
    def layout(self, head_dim: int) -> RecordLayout:
        """Bytes of a record at this head dim."""

    def refined_layers(self, layers: int) -> int:
        """How many of a model's layers get low bits beside their records; which ones, a calibration says."""
        return 0

    @abstractmethod
    def fit(self, moments: Moments) -> Calibration:
        """Choose the parameters of all layers and heads."""

    @abstractmethod
    def codec(self, calibration: Calibration, device: torch.device | str) -> Codec:
        """Bind to a calibration of this recipe; CalibrationError when it is of another recipe or lacks tensors."""

    def _check(self, calibration: Calibration) -> None:
        if calibration.recipe != self.name:
            raise CalibrationError(f"this calibration is for recipe '{calibration.recipe}', not '{self.name}': calibrate again")


def _times(x: Tensor, matrices: Tensor) -> Tensor:
    """float64 [T, H, D] times [H, D, D], rounded once to float32."""
    return torch.matmul(x.transpose(0, 1), matrices.double()).transpose(0, 1).float().contiguous()
