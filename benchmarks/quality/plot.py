"""KL against effective bits, one line a policy."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.quality.grid import EVEN

COLOURS = {"attention": "tab:blue", "window": "tab:orange", "random": "tab:green", "uniform K": "tab:red"}
STYLES = {("int8", None): "-", ("int4", None): "--", ("int8", 2.0): ":"}
"""Format of hot rows, and bits of the records' keys: 2.0 has its row scales searched, None is the recipe's own."""


def draw(report: dict[str, Any], path: Path, window: int = 256) -> None:
    """Write the picture: recipe tck with int8 rows solid and int4 rows dashed, other recipes at their own bits as grey marks."""
    parts = report["text"]["lengths"]
    figure, panels = plt.subplots(1, len(parts), figsize=(7.5 * len(parts), 5.5), layout="constrained", squeeze=False)
    for axes, (length, part) in zip(panels[0], parts.items(), strict=True):
        _panel(axes, part["table"], window)
        axes.set(title=f"prefixes of {length} tokens, {part['positions']} positions")
    figure.suptitle(f"{report['model']}, recipe tck: readers that gave no mass, recent window {window}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axes: plt.Axes, table: list[dict[str, Any]], window: int) -> None:
    """One length of prefixes."""
    plain = [r for r in table if r["window"] == window and r["score"] == "mass" and r["granularity"] == "page"]
    tck = [r for r in plain if r["recipe"] == ("tck" if r["key_bits"] is None else EVEN)]
    start = {r["key_bits"]: r for r in tck if r["policy"] == "none"}
    for policy in ("attention", "window", "random"):
        for (row_format, key_bits), style in STYLES.items():
            ours = [r for r in tck if (r["policy"], r["row_format"], r["key_bits"]) == (policy, row_format, key_bits)]
            label = f"{policy}, {row_format} rows" + (", row scales searched" if key_bits else "")
            _line(axes, [start[key_bits], *ours] if ours and key_bits in start else ours, COLOURS[policy], style, label)
    server = [r for r in table if r["window"] == window and r["granularity"] == "server"]
    for recipe, style, label in (("tck", "-", ""), (EVEN, ":", ", no refined layers")):
        cold = [r for r in plain if r["recipe"] == recipe and r["policy"] == "none" and r["key_bits"] is None]
        ours = [*cold, *(r for r in server if r["recipe"] == recipe)]
        _line(axes, ours, "tab:purple", style, "attention, pages at the server's levels" + label)
    uniform = [row for bits, row in start.items() if bits]
    _line(axes, uniform, COLOURS["uniform K"], "-", "uniform K of 2 to 3.25 bits, row scales searched")
    for recipe, marker in (("mulm", "^"), ("oscar", "s")):
        for row in (r for r in plain if r["recipe"] == recipe and r["policy"] == "none"):
            axes.plot(row["bits"], row["kl"], marker, color="tab:gray", label=f"{recipe}, no hot rows")
    axes.set(yscale="log", xlabel="effective bits between sinks and recent window (records, scales, hot rows, masks)")
    axes.set(ylabel="mean KL to the exact cache (nats)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)


def _line(axes: plt.Axes, rows: list[dict[str, Any]], colour: str, style: str, label: str) -> None:
    rows = sorted(rows, key=lambda r: r["bits"])
    if rows:
        x, y, error = ([r[key] for r in rows] for key in ("bits", "kl", "kl_error"))
        axes.errorbar(x, y, error, color=colour, ls=style, marker="o", ms=4, capsize=2, label=label)
