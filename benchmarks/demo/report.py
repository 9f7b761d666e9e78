"""The result of the demo: `report.json`, and the table that is printed."""

from benchmarks.demo.quality import Quality
from benchmarks.demo.workload import Replay

BF16_BYTES = 2


class BudgetError(RuntimeError):
    """A server allocated more bytes for its KV cache than it was given."""


def bf16_bytes_per_token(config: dict) -> int:
    """K and V of one token over all layers, from a Hugging Face `config.json`."""
    return config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2 * BF16_BYTES


def server_summary(replay: Replay, info: dict, bytes_per_token: float) -> dict:
    """The entry of one server in the report."""
    return {
        "max_total_num_tokens": info["max_total_num_tokens"],
        "prompt_tokens": replay.prompt_tokens,
        "cached_tokens": replay.cached_tokens,
        "hit_rate": replay.cached_tokens / replay.prompt_tokens,
        "bytes_per_token": bytes_per_token,
        "turns": replay.by_turn(),
    }


def assemble(version: str, budget: int, bf16: dict, oscar: dict, kv_quant: dict, quality: Quality) -> dict:
    """The whole report.

    Args:
        version: SGLang's version.
        budget: bytes that both servers were given for their KV cache.
        bf16, oscar: from `server_summary`.
        kv_quant: `/server_info` -> `internal_states[0]["kv_quant"]` of the second server.

    Raises:
        BudgetError: the second server allocated more than `budget`.
    """
    allocated = sum(kv_quant["allocated_bytes"].values())
    if allocated > budget:
        raise BudgetError(f"--kv-quant oscar allocated {allocated} bytes for its KV cache, the budget is {budget}: an unfair comparison")
    return {
        "sglang_version": version,
        "kv_budget_bytes": budget,
        "bf16": bf16,
        "oscar": oscar,
        "capacity_ratio": oscar["max_total_num_tokens"] / bf16["max_total_num_tokens"],
        "effective_bits": kv_quant["effective_bits"],
        "quality": {"mean_kl": quality.mean_kl, "top1_agreement": quality.top1_agreement, "positions": quality.positions},
    }


def table(report: dict, quality: Quality, levels: dict) -> str:
    """The report for people."""
    bf16, oscar = report["bf16"], report["oscar"]
    rows = [
        ("KV cache, MB", f"{report['kv_budget_bytes'] / 1e6:.1f}", f"{report['kv_budget_bytes'] / 1e6:.1f}"),
        ("capacity, tokens", bf16["max_total_num_tokens"], oscar["max_total_num_tokens"]),
        ("bytes per token", f"{bf16['bytes_per_token']:.0f}", f"{oscar['bytes_per_token']:.0f}"),
        ("bits per element", "16", f"{report['effective_bits']:.2f}"),
        ("prompt tokens", bf16["prompt_tokens"], oscar["prompt_tokens"]),
        ("  of these from the cache", bf16["cached_tokens"], oscar["cached_tokens"]),
        ("hit rate", f"{bf16['hit_rate']:.1%}", f"{oscar['hit_rate']:.1%}"),
    ]
    for ours, theirs in zip(oscar["turns"], bf16["turns"], strict=True):
        rows.append((f"  turn {ours['turn']}, hit rate", *(f"{t['cached_tokens'] / t['prompt_tokens']:.1%}" for t in (theirs, ours))))
    lines = [f"SGLang {report['sglang_version']}, same bytes for the KV cache", f"{'':28}{'bf16':>12}{'oscar':>12}"]
    lines += [f"{name:28}{left!s:>12}{right!s:>12}" for name, left, right in rows]
    lines.append(f"capacity ratio {report['capacity_ratio']:.2f}")
    lines.append("tokens and bytes by level at the end: " + ", ".join(f"{k}: {v['tokens']} / {v['bytes']}" for k, v in levels.items()))
    lines.append(
        f"next-token KL(bf16 || oscar) {quality.mean_kl:.4f} nats (median {quality.median_kl:.4f}), "
        f"same first choice {quality.top1_agreement:.1%}, {quality.positions} positions after a prefix hit"
    )
    lines.append(
        f"  compared one by one: tokens that hold {quality.covered_mass:.2%} of the mass; "
        f"{quality.cached_share:.1%} of the prefixes came out of the cache"
    )
    return "\n".join(lines)
