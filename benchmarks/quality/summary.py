"""From measured prefixes to a table, its comparisons and the verdict on the targets."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.bits import effective_bits, record_bytes
from benchmarks.quality.grid import ROW_BITS, Cell
from benchmarks.quality.measure import Measured
from benchmarks.quality.scoring import mean_and_error, paired_difference, paired_ratio
from oscar_radix.calibration.evaluate import SINK_TOKENS
from oscar_radix.codec import get_recipe
from oscar_radix.geometry import PAGE_TOKENS

KL_TARGET, TOP1_TARGET, BITS_TARGET, RATIO_TARGET = 0.012, 0.945, 2.8, 3.0


def bits_of(cell: Cell, head_dim: int, prefixes: list[int]) -> tuple[float, float]:
    """Effective bits of the tokens between sinks and recent window, and of whole prefixes, both from bytes; mean over prefixes."""
    record = record_bytes(get_recipe(cell.recipe).layout(head_dim), head_dim, cell.key_bits)
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


def row_of(measured: list[Measured], cell: Cell, head_dim: int) -> dict[str, Any]:
    """One line of the table: continuing readers, and quoting ones apart. Errors: one standard error over readers, whose positions are
    not independent."""
    middle, whole = bits_of(cell, head_dim, [m.prefix for m in measured])
    row: dict[str, Any] = {**asdict(cell), "bits": round(middle, 4), "bits_with_window": round(whole, 4)}
    for name, what in (("kl", "kl"), ("top1", "same"), ("dnll", "rise")):
        row[name], row[f"{name}_error"] = (round(x, 6) for x in mean_and_error(readers_of(measured, cell, what)))
    row["perplexity_ratio"] = round(float(torch.tensor(row["dnll"]).exp()), 5)
    row["mass_covered"] = round(sum(m.covered[cell] for m in measured) / len(measured), 4)
    for name, what in (("kl_quote", "kl"), ("top1_quote", "same")):
        row[name], row[f"{name}_error"] = (round(x, 6) for x in mean_and_error(readers_of(measured, cell, what, quotes=True)))
    row["kl_by_kind"] = {kind: round(_mean_of(measured, cell, lambda m, k: k == kind), 5) for kind in measured[0].kinds}
    row["kl_by_prefix"] = {n: round(_mean_of(measured, cell, lambda m, k: m.prefix == n and k != "quote"), 5)
                           for n in dict.fromkeys(m.prefix for m in measured)}
    return row


def _mean_of(measured: list[Measured], cell: Cell, wanted: Callable[[Measured, str], bool]) -> float:
    """Mean KL of some readers."""
    return float(torch.cat([m.scores[cell].kl[i] for m in measured for i, kind in enumerate(m.kinds) if wanted(m, kind)]).mean())


def comparisons(measured: list[Measured], cells: list[Cell]) -> list[dict[str, Any]]:
    """Each attention cell of the default score and granularity against its controls at equal bytes, reader by reader."""
    out = []
    plain = [c for c in cells if c.policy == "attention" and c == Cell(c.recipe, c.policy, c.rows, c.row_format, c.window)]
    for cell in plain:
        controls = [Cell(cell.recipe, policy, cell.rows, cell.row_format, cell.window) for policy in ("window", "random")]
        controls += [Cell(window=cell.window, key_bits=3.0)] if (cell.recipe, cell.rows, cell.row_format) == ("tck", 2, "int8") else []
        for control in (c for c in controls if c in cells):
            ours, theirs = readers_of(measured, cell, "kl"), readers_of(measured, control, "kl")
            ratio, low, high = paired_ratio(theirs, ours)
            difference, error = paired_difference(theirs, ours)
            interval = [round(low, 3), round(high, 3)]
            out.append({"cell": asdict(cell), "control": control.line, "kl_ratio": round(ratio, 3), "ratio_95": interval,
                        "kl_difference": round(difference, 6), "difference_error": round(error, 6)})
    return out


def verdicts(table: list[dict[str, Any]], compared: list[dict[str, Any]]) -> list[str]:
    """The targets, each with hit or missed."""
    lines = []
    within = [row for row in table if row["policy"] == "attention" and row["recipe"] == "tck" and row["bits"] <= BITS_TARGET]
    for row in within:
        if row["score"] == "mass" and row["granularity"] == "page":
            hit = row["kl"] <= KL_TARGET and row["top1"] >= TOP1_TARGET
            lines.append(f"{'hit' if hit else 'missed'}: KL {row['kl']:.4f} (<= {KL_TARGET}), top-1 {row['top1']:.3f} (>= {TOP1_TARGET}) "
                         f"at {row['bits']:.2f} bits ({row['rows']} {row['row_format']} rows, window {row['window']})")
    for entry in compared:
        cell = entry["cell"]
        if cell["recipe"] == "tck" and cell["rows"] == 2 and entry["control"] in ("window", "random"):
            hit = entry["kl_ratio"] >= RATIO_TARGET
            lines.append(f"{'hit' if hit else 'missed'}: attention {entry['kl_ratio']:.2f} times lower KL than {entry['control']} "
                         f"{entry['ratio_95']} (>= {RATIO_TARGET}; 2 {cell['row_format']} rows, window {cell['window']})")
    return lines
