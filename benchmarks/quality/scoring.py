"""Means with standard errors, and paired comparisons, over readers."""

from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 2000


@dataclass(frozen=True)
class Scores:
    """Of some readers [R, T] against the exact cache. kl: nats; same: the same likeliest token; rise: of the true next token's
    negative log-likelihood; hit: the true next token was the likeliest."""

    kl: Tensor
    same: Tensor
    rise: Tensor
    hit: Tensor


def score(exact: Tensor, got: Tensor, ids: Tensor) -> Scores:
    """Log-probabilities [R, T, vocab] of both caches after each of ids [R, T]; the last position of `rise` and `hit` is NaN."""
    kl = torch.stack([(e.exp() * (e - g)).sum(-1) for e, g in zip(exact, got, strict=True)])
    following = ids[:, 1:, None]
    pad = torch.full((len(ids), 1), torch.nan, device=kl.device)
    rise = torch.cat(((exact[:, :-1].gather(-1, following) - got[:, :-1].gather(-1, following)).squeeze(-1), pad), 1)
    best = got.argmax(-1)
    hit = torch.cat(((best[:, :-1] == ids[:, 1:]).float(), pad), 1)
    return Scores(*(x.float().cpu() for x in (kl, exact.argmax(-1) == best, rise, hit)))


def mean_and_error(readers: Tensor) -> tuple[float, float]:
    """Mean of [R] reader means and its standard error, infinite for one: readers are independent draws, positions of one reader are not."""
    return float(readers.mean()), float(readers.std() / len(readers) ** 0.5) if len(readers) > 1 else float("inf")


def paired_difference(readers: Tensor, control: Tensor) -> tuple[float, float]:
    """Mean of readers [R] minus the same readers under a control, and its standard error."""
    return mean_and_error(readers - control)


def paired_ratio(control: Tensor, readers: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """Mean of the control over mean of `readers`, both [R], with its 95 % interval by bootstrap over readers."""
    drawn = torch.randint(0, len(readers), (DRAWS, len(readers)), generator=torch.Generator().manual_seed(seed))
    ratios = control[drawn].mean(-1) / readers[drawn].mean(-1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975])).tolist()
    return float(control.mean() / readers.mean()), low, high
