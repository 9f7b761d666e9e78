"""`report.png`: cached tokens per turn of both servers; tokens and bytes by precision level of ours."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(report: dict, rounds: list[dict], path: Path) -> None:
    """Write the picture.

    Args:
        report: from `report.assemble`.
        rounds: `kv_quant` after every round; only its `levels` (level -> {tokens, bytes}) are drawn.
        path: PNG to write.
    """
    figure, (hits, tokens, space) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    _hits(hits, report)
    _stacked(tokens, rounds, "tokens", 1, "tokens held, by precision level")
    _stacked(space, rounds, "bytes", 1e6, "bytes used, by precision level (MB)")
    figure.suptitle(
        f"{report['kv_budget_bytes'] / 1e6:.0f} MB of KV cache: bf16 {report['bf16']['max_total_num_tokens']} tokens, "
        f"oscar {report['oscar']['max_total_num_tokens']} tokens ({report['effective_bits']:.2f} bits per element)"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _hits(axes, report: dict) -> None:
    turns = [entry["turn"] for entry in report["bf16"]["turns"]]
    axes.plot(turns, [entry["prompt_tokens"] for entry in report["bf16"]["turns"]], "k--", label="prompt tokens (bf16 run)")
    for shift, name, colour in ((-0.2, "bf16", "tab:gray"), (0.2, "oscar", "tab:blue")):
        cached = [entry["cached_tokens"] for entry in report[name]["turns"]]
        axes.bar([turn + shift for turn in turns], cached, width=0.4, label=f"{name}, from the cache", color=colour)
    axes.set(title="cached tokens per turn, all agents", xlabel="turn", xticks=turns)
    axes.set_ylim(top=1.4 * axes.get_ylim()[1])  # room for the legend above the bars
    axes.legend(loc="upper left")


def _stacked(axes, rounds: list[dict], what: str, unit: float, title: str) -> None:
    # Levels that no page ever had would only crowd the legend.
    levels = dict.fromkeys(level for entry in rounds for level, held in entry["levels"].items() if held[what])
    numbers = range(1, len(rounds) + 1)
    below = [0.0] * len(rounds)
    for level in levels:
        heights = [entry["levels"].get(level, {what: 0})[what] / unit for entry in rounds]
        axes.bar(numbers, heights, bottom=below, label=level if level == "fresh" else f"level {level}")
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(title=title, xlabel="after round", xticks=list(numbers))
    axes.legend(loc="upper left")
