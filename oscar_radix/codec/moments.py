"""What a recipe is fitted on: first and second moments of keys, queries and values, per layer and KV head."""

from dataclasses import dataclass

from torch import Tensor

from oscar_radix.geometry import Geometry


@dataclass(frozen=True)
class Moments:
    """float64 CPU tensors; L layers, H KV heads, D head dim. Keys and queries are post-RoPE.

    logit_damage                  [L, H]        mean over queries of sum_i p_i^2 |v_i - o|^2 scale^2: what a unit error of all logits does
    value_damage                  [L, H]        mean over queries of sum_i p_i^2 |v_i|^2
    output_energy                 [L, H]        mean over queries of |o|^2
    key_mean, value_mean          [L, H, D]     mean row
    key_damage_mean               [L, H, D]     the same, keys weighted by what their errors do to outputs
    key_second                    [L, H, D, D]  mean of k^T k
    query_second                  [L, H, D, D]  mean of q^T q over the GQA group of the head
    query_damage_second           [L, H, D, D]  the same, queries weighted by what errors of keys do to their outputs
    value_weighted_mean           [L, H, D]     mean of w v, weights of mean 1
    value_weighted_second         [L, H, D, D]  mean of w v^T v
    """

    geometry: Geometry
    tokens: int
    skipped_rows: int
    logit_damage: Tensor
    value_damage: Tensor
    output_energy: Tensor
    key_mean: Tensor
    key_damage_mean: Tensor
    key_second: Tensor
    query_second: Tensor
    query_damage_second: Tensor
    value_mean: Tensor
    value_weighted_mean: Tensor
    value_weighted_second: Tensor

    @property
    def key_covariance(self) -> Tensor:
        """[L, H, D, D]: covariance of the keys about their mean."""
        return self.key_second - self.key_mean.unsqueeze(-1) * self.key_mean.unsqueeze(-2)

    @property
    def value_weighted_covariance(self) -> Tensor:
        """[L, H, D, D]: mean of w (v - mu)^T (v - mu), mu the plain mean of the values."""
        cross = self.value_weighted_mean.unsqueeze(-1) * self.value_mean.unsqueeze(-2)
        outer = self.value_mean.unsqueeze(-1) * self.value_mean.unsqueeze(-2)
        return self.value_weighted_second - cross - cross.mT + outer
