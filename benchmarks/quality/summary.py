"""From measured prefixes to a table, its comparisons and the verdict on the targets."""

from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.bits import effective_bits, record_bytes
from benchmarks.quality.grid import EVEN, MEASURED, ROW_BITS, UNIFORM_BITS, Cell
from benchmarks.quality.measure import Measured
from benchmarks.quality.scoring import Scores, mean_and_error, paired_difference, paired_ratio
from benchmarks.quality.texts import GIVERS
from oscar_radix.calibration.evaluate import SINK_TOKENS
from oscar_radix.geometry import PAGE_TOKENS, Geometry

UNIFORM_AT = {1: "uniform K 2.75", 2: "uniform K 3.25"}
"""The control of uniform bits at the bytes of a number of hot rows, where a sixteenth of the layers is refined."""
KL_TARGET, TOP1_TARGET, BITS_TARGET, RATIO_TARGET, UNIFORM_TARGET = 0.012, 0.945, 2.8, 3.0, 1.5


def bits_of(cell: Cell, geometry: Geometry, prefixes: list[int]) -> tuple[float, float]:
    """Effective bits of the tokens between sinks and recent window, and of whole prefixes, both from bytes; mean over prefixes."""
    recipe, head_dim = MEASURED[cell.recipe], geometry.head_dim
    refined = recipe.refined_layers(geometry.layers) / geometry.layers
    record = record_bytes(recipe.layout(head_dim), head_dim, cell.key_bits, refined)
    share = cell.rows / PAGE_TOKENS
    middle = effective_bits(record, head_dim, share, ROW_BITS[cell.row_format])
    whole = []
    for tokens in prefixes:
        always = (SINK_TOKENS + cell.window) / tokens
        whole.append(always * effective_bits(record, head_dim, 1.0, 8) + (1 - always) * middle)
    return middle, sum(whole) / len(whole)


def readers_of(measured: list[Measured], cell: Cell, what: str, quotes: bool = False) -> Tensor:
    """Mean of each evaluated reader over its positions, [readers of all prefixes]: those that continue, or those that quote."""
    wanted = [[(kind == "quote") == quotes for kind in m.kinds] for m in measured]
    return torch.cat([torch.nanmean(getattr(m.scores[cell], what)[mask], 1) for m, mask in zip(measured, wanted, strict=True)])


def row_of(measured: list[Measured], cell: Cell, geometry: Geometry) -> dict[str, Any]:
    """One line of the table: continuing readers, and quoting ones apart. Errors: one standard error over readers, whose positions are
    not independent."""
    measured = [m for m in measured if cell in m.scores]
    middle, whole = bits_of(cell, geometry, [m.prefix for m in measured])
    row: dict[str, Any] = {**asdict(cell), "bits": round(middle, 4), "bits_with_window": round(whole, 4)}
    for name, what in (("kl", "kl"), ("top1", "same"), ("dnll", "rise")):
        row[name], row[f"{name}_error"] = (round(x, 6) for x in mean_and_error(readers_of(measured, cell, what)))
    row["perplexity_ratio"] = round(float(torch.tensor(row["dnll"]).exp()), 5)
    row["mass_covered"] = round(sum(m.covered[cell] for m in measured) / len(measured), 4)
    for name, what in (("kl_quote", "kl"), ("top1_quote", "same")):
        row[name], row[f"{name}_error"] = (round(x, 6) for x in mean_and_error(readers_of(measured, cell, what, quotes=True)))
    every = [(m.prefix, kind, float(kl)) for m in measured for kind, kl in zip(m.kinds, m.scores[cell].kl.mean(1), strict=True)]
    row["kl_by_kind"] = _means([(kind, kl) for _, kind, kl in every])
    row["positions"] = sum(m.scores[cell].kl.shape[1] for m in measured for kind in m.kinds if kind != "quote")
    row["kl_readers"] = [round(kl, 5) for _, _, kl in every]
    return row


def _means(named: list[tuple[str, float]]) -> dict[str, float]:
    """Mean value of each name."""
    return {name: round(fmean(value for other, value in named if other == name), 5) for name in dict.fromkeys(n for n, _ in named)}


def comparisons(measured: list[Measured], cells: list[Cell]) -> list[dict[str, Any]]:
    """Each attention cell against its controls at equal bytes, and each searched one against the default, reader by reader.

    kl_ratio: of the control's mean KL to the cell's, above 1 when the cell is better, with its 95 % interval.
    """
    out = []
    for cell in (c for c in cells if c.policy == "attention"):
        default = replace(cell, score=Cell().score, granularity=Cell().granularity)
        shipped = cell.granularity == "server"
        if cell == default or shipped:
            controls = [replace(default, policy=policy) for policy in ("window", "random")]
            uniform = UNIFORM_BITS if cell.recipe == "tck" and cell.rows in (1, 2) else ()
            controls += [Cell(EVEN, window=cell.window, key_bits=bits) for bits in uniform]
            controls += [replace(cell, recipe=EVEN)] if cell.recipe == "tck" else []
        else:
            controls = [default]
        for control in (c for c in controls if c in cells):
            both = [m for m in measured if cell in m.scores and control in m.scores]
            ours, theirs = readers_of(both, cell, "kl"), readers_of(both, control, "kl")
            ratio, low, high = paired_ratio(theirs, ours)
            difference, error = paired_difference(theirs, ours)
            named = "default score and granularity" if control == default else f"{control.line} {control.key_bits or ''}".strip()
            named = "no refined layers" if control.policy == "attention" and control.recipe != cell.recipe else named
            out.append({"cell": asdict(cell), "control": named, "kl_ratio": round(ratio, 3), "ratio_95": [round(low, 3), round(high, 3)],
                        "kl_difference": round(difference, 6), "difference_error": round(error, 6)})
    return out


def by_length(measured: list[Measured], cells: list[Cell], geometry: Geometry) -> dict[str, Any]:
    """A report for each length of prefixes: the damage differs too much between lengths for one mean."""
    lengths = dict.fromkeys(m.prefix for m in measured)
    return {"lengths": {str(n): text_report([m for m in measured if m.prefix == n], cells, geometry) for n in lengths}}


def text_report(measured: list[Measured], cells: list[Cell], geometry: Geometry) -> dict[str, Any]:
    """Everything about some prefixes of one length."""
    cells = list(dict.fromkeys([*cells, *measured[0].scores]))
    table = [row_of(measured, cell, geometry) for cell in cells]
    compared = comparisons(measured, cells)
    continuing = [kind for kind in measured[0].kinds if kind != "quote"]
    return {
        "prefixes": [m.prefix for m in measured],
        "readers": {"give mass": list(GIVERS), "evaluated": list(measured[0].kinds), "tokens": measured[0].exact.kl.shape[1]},
        "positions": len(continuing) * sum(m.exact.kl.shape[1] for m in measured),
        "targets": verdicts(table, compared),
        "comparisons": compared,
        "table": table,
    }


def recall_report(measured: list[Measured], cells: list[Cell], geometry: Geometry) -> dict[str, Any]:
    """Share of answer tokens that are the likeliest: key-value lines and copies, by the exact cache and by every cell."""
    tasks = list(dict.fromkeys(m.kinds[0] for m in measured))

    def accuracy(scores_of: Callable[[Measured], Scores]) -> dict[str, Any]:
        out = {}
        for task in tasks:
            readers = torch.cat([torch.nanmean(scores_of(m).hit, 1) for m in measured if m.kinds[0] == task])
            out[task], out[f"{task}_error"] = (round(x, 4) for x in mean_and_error(readers))
        return out

    table = [{**asdict(c), "bits": round(bits_of(c, geometry, [1])[0], 4), **accuracy(lambda m, c=c: m.scores[c])} for c in cells]
    answers = {task: int(sum(m.exact.hit.isfinite().sum() for m in measured if m.kinds[0] == task)) for task in tasks}
    return {"prefixes": [m.prefix for m in measured], "answer_tokens": answers, "exact": accuracy(lambda m: m.exact), "table": table}


def verdicts(table: list[dict[str, Any]], compared: list[dict[str, Any]]) -> list[str]:
    """The targets, each with hit or missed."""
    said = []
    within = [row for row in table if row["policy"] == "attention" and row["recipe"] == "tck" and row["bits"] <= BITS_TARGET]
    for row in within:
        if row["score"] == "mass" and row["granularity"] in ("page", "server"):
            hit = row["kl"] <= KL_TARGET and row["top1"] >= TOP1_TARGET
            said.append(f"{'hit' if hit else 'missed'}: KL {row['kl']:.4f} (<= {KL_TARGET}), top-1 {row['top1']:.3f} (>= {TOP1_TARGET}) "
                        f"at {row['bits']:.2f} bits ({_named(row)})")
    for entry in compared:
        cell = entry["cell"]
        if cell["rows"] not in UNIFORM_AT:
            continue
        wanted = {"window": RATIO_TARGET, "random": RATIO_TARGET, UNIFORM_AT[cell["rows"]]: UNIFORM_TARGET}.get(entry["control"])
        if cell["recipe"] == "tck" and wanted:
            hit = entry["kl_ratio"] >= wanted
            said.append(f"{'hit' if hit else 'missed'}: attention {entry['kl_ratio']:.2f} times lower KL than {entry['control']} "
                         f"{entry['ratio_95']} (>= {wanted}; {_named(cell)})")
    return said


def _named(cell: dict[str, Any]) -> str:
    rule = "as the server chooses, " if cell["granularity"] == "server" else ""
    searched = ", row scales searched" if cell["key_bits"] else ""
    return f"{cell['rows']} {cell['row_format']} rows, {rule}window {cell['window']}{searched}"


def lines(report: dict[str, Any]) -> list[str]:
    """The table for a terminal, for each length of prefixes."""
    if "lengths" in report:
        return [line for length, part in report["lengths"].items() for line in (f"prefixes of {length} tokens", *lines(part))]
    said = []
    for row in report["table"]:
        key_bits = f"K{row['key_bits']} " if row["key_bits"] else ""
        name = f"{row['recipe']} {key_bits}{row['policy']} {row['rows']} {row['row_format']} W{row['window']}"
        name += f" {row['score']}, {row['granularity']}" if row["policy"] == "attention" else ""
        name += ", miss" if row["path"] == "miss" else ""
        numbers = [f"{key} {row[key]:.4f}+-{row[key + '_error']:.4f}" for key in row if f"{key}_error" in row]
        said.append(f"{name:75s} {row['bits']:.3f} bits  {'  '.join(numbers)}")
    return said + report.get("targets", [])
