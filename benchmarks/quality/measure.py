"""One shared prefix through every cell of a grid."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.grid import MEASURED, SCORES, Cell, Evidence
from benchmarks.quality.reading import Readers, compute_prefix
from benchmarks.quality.rows import PrefixRows
from benchmarks.quality.scoring import Scores, score
from benchmarks.quality.selection import choose
from benchmarks.quality.texts import Shared
from oscar_radix.calibration.predicted import fit
from oscar_radix.codec import Calibration, Codec, Moments


@dataclass(frozen=True)
class Fitted:
    """A codec with the calibration it is bound to, and the query second moment in its basis [L, H, D, D]: the metric of K's errors."""

    codec: Codec
    calibration: Calibration
    metric: Tensor

    @classmethod
    def of(cls, recipe: str, moments: Moments, device: torch.device | str) -> "Fitted":
        calibration = fit(MEASURED[recipe], moments)
        codec = MEASURED[recipe].codec(calibration, device)
        basis = codec.query_basis.double().cpu()
        return cls(codec, calibration, (basis.mT @ moments.query_second.cpu() @ basis).float().to(device))


@dataclass
class Measured:
    """Scores of each cell on one shared prefix, and share of the readers' mass between sinks and window that its hot rows hold."""

    name: str
    kinds: tuple[str, ...]
    prefix: int
    scores: dict[Cell, Scores] = field(default_factory=dict)
    covered: dict[Cell, float] = field(default_factory=dict)
    exact: Scores | None = None


def row_errors(rows: PrefixRows, metric: Tensor, scale: float) -> Tensor:
    """[L, H, P]: mean squared logit error of each 2-bit key times |v|**2, plus the squared error of its value."""
    errors = []
    for layer, ((k, v), (k8, v8)) in enumerate(zip(rows.cold, rows.hot, strict=True)):
        wrong, off = (k - k8).transpose(0, 1), (v - v8).square().sum(-1).T
        logit = ((wrong @ metric[layer]) * wrong).sum(-1) * scale**2
        errors.append(logit * v8.square().sum(-1).T + off)
    return torch.stack(errors)


def measure(model: Any, fitted: dict[str, Fitted], shared: Shared, cells: list[Cell], progress: Any) -> Measured:
    """Compute the prefix, gather mass from the givers reading 2-bit rows (window 256), then read it as each cell keeps it."""
    geometry = next(iter(fitted.values())).codec.geometry
    layers, heads, device = geometry.layers, geometry.kv_heads, model.device
    ids = [torch.tensor(x, device=device) for x in (shared.prefix, shared.givers, shared.evaluated)]
    prefix = compute_prefix(model, ids[0], layers, heads)
    givers, readers = (Readers(model, x, prefix.tokens) for x in ids[1:])
    exact = readers.read(lambda layer: (prefix.keys[layer], prefix.values[layer]))
    result = Measured(shared.name, shared.kinds, prefix.tokens, exact=score(exact, exact, ids[2]))
    for recipe in dict.fromkeys(cell.recipe for cell in cells):
        codec, metric = fitted[recipe].codec, fitted[recipe].metric
        rows = PrefixRows(codec, fitted[recipe].calibration, prefix.keys, prefix.values)
        mass = givers.mass(partial(_read, rows, Cell(recipe), None), rows.hot.__getitem__, codec, layers, heads)
        evidence = Evidence(prefix, mass, row_errors(rows, metric, geometry.head_dim**-0.5))
        for cell in (cell for cell in cells if cell.recipe == recipe):
            cold = cell.cold(prefix.tokens)
            chosen = torch.zeros(layers, heads, prefix.tokens, dtype=torch.bool, device=device)
            chosen[..., cold] = choose(cell.policy, SCORES[cell.score](evidence)[..., cold], cell.rows, cell.granularity)
            prompt = (_questions(shared, device), rows.hot.__getitem__) if cell.path == "miss" else None
            result.scores[cell] = score(exact, readers.read(partial(_read, rows, cell, chosen), codec, prompt), ids[2])
            result.covered[cell] = float((mass.first * chosen)[..., cold].sum() / mass.first[..., cold].sum())
            progress(f"{shared.name}: {cell} KL {float(result.scores[cell].kl.mean()):.4f}")
    return result if shared.scored is None else _answers_only(result, torch.tensor(shared.scored))


def _questions(shared: Shared, device: torch.device) -> Tensor:
    """Tokens of each reader before its answer: bool [R, T].

    Raises:
        ValueError: the readers of this prefix have no answers.
    """
    if shared.scored is None:
        raise ValueError(f"{shared.name}: its readers have no answers, so there is no path 'miss'")
    answers = torch.tensor(shared.scored, device=device).cumsum(1) > 0
    return ~torch.cat((torch.zeros_like(answers[:, :1]), answers[:, :-1]), 1)


def _answers_only(result: Measured, scored: Tensor) -> Measured:
    """Hits at other positions than answers' become NaN; scored: bool [R, T], the token after this one belongs to an answer."""
    for scores in (result.exact, *result.scores.values()):
        scores.hit[~scored] = torch.nan
    return result


def _read(rows: PrefixRows, cell: Cell, chosen: Tensor | None, layer: int) -> tuple[Tensor, Tensor]:
    """What a reader finds in one layer of a cell; chosen: bool [L, H, P], None: no hot rows."""
    tokens, heads, _ = rows.hot[layer][0].shape
    whole = torch.ones(tokens, dtype=torch.bool, device=rows.codec.device)
    whole[cell.cold(tokens)] = False
    hot = torch.zeros(heads, tokens, dtype=torch.bool, device=whole.device) if chosen is None else chosen[layer]
    return rows.mixed(layer, whole, hot, cell.row_format, cell.key_bits)
