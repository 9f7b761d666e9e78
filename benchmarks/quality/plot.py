"""KL against effective bits, one line a policy."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"attention": "tab:blue", "window": "tab:orange", "random": "tab:green", "uniform K": "tab:red"}


def draw(report: dict[str, Any], path: Path, window: int = 256) -> None:
    """Write the picture: recipe tck with int8 rows solid and int4 rows dashed, other recipes at their own bits as grey marks."""
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    plain = [r for r in report["table"] if r["window"] == window and r["score"] == "mass" and r["granularity"] == "page"]
    base = [r for r in plain if r["recipe"] == "tck" and r["policy"] == "none" and not r["key_bits"]]
    for line, colour in COLOURS.items():
        for row_format, style in (("int8", "-"), ("int4", "--")):
            ours = [r for r in plain if r["recipe"] == "tck" and (r["key_bits"] if line == "uniform K" else r["policy"] == line)]
            ours = sorted(base + [r for r in ours if r["row_format"] == row_format], key=lambda r: r["bits"])
            if len(ours) > 1:
                errors = [r["kl_error"] for r in ours]
                label = line if line == "uniform K" else f"{line}, {row_format} rows"
                axes.errorbar([r["bits"] for r in ours], [r["kl"] for r in ours], errors, color=colour, ls=style, marker="o", ms=4,
                              capsize=2, label=label)
    for recipe, marker in (("mulm", "^"), ("oscar", "s")):
        for row in (r for r in plain if r["recipe"] == recipe and r["policy"] == "none"):
            axes.plot(row["bits"], row["kl"], marker, color="tab:gray", label=f"{recipe}, no hot rows")
    axes.set(yscale="log", xlabel="effective bits between sinks and recent window (records, scales, hot rows, masks)",
             ylabel="mean KL to the exact cache (nats)", 
             title=f"{report['model']}: {report['positions']} positions, readers that gave no mass; window {window}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
