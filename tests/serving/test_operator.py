"""What an operator sees in the log and in /server_info."""

import json
import re

import pytest

from oscar_radix.cli import main
from oscar_radix.codec import RECIPES
from tests.serving.client import BUDGET_TOKENS, computed, log_text, pages, piece, settled

BF16_BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 2
"""30 layers, K and V, 3 KV heads, head dim 64, 2 bytes."""


def test_startup_lines(ours):
    log = log_text(ours)
    assert re.search(r"kv-quant oscar: recipe \w+, policy none, recent window 256 tokens, calibration (cached|made|from)", log)
    line = re.search(
        r"kv-quant oscar: (\d+) tokens of KV in ([\d.]+) MiB, ([\d.]+) times the (\d+) of bf16; ([\d.]+) effective bits per element", log
    )
    tokens, mib, ratio, bf16, bits = (float(value) for value in line.groups())
    assert tokens == ours.server_info()["max_total_num_tokens"]
    assert tokens / bf16 == pytest.approx(ratio, rel=0.01)
    assert bf16 * BF16_BYTES_PER_TOKEN / 2**20 == pytest.approx(mib, rel=0.01)
    assert ratio * bits <= 16


def test_report_in_server_info(ours):
    ours.generate(piece(600, seed=50), 8)
    report = settled(ours)
    assert report["recipe"] in RECIPES
    assert report["policy"] == "none"
    assert report["page_tokens"] == 32
    held = sum(report["allocated_bytes"].values())
    assert 0.95 * report["kv_budget_bytes"] < held <= report["kv_budget_bytes"] <= BUDGET_TOKENS * BF16_BYTES_PER_TOKEN
    assert report["bytes_per_token"] == pytest.approx(held / report["max_total_num_tokens"])
    assert report["effective_bits"] == pytest.approx(16 * report["bytes_per_token"] / BF16_BYTES_PER_TOKEN, rel=0.02)
    tokens = {level: entry["tokens"] for level, entry in report["levels"].items()}
    # 18 or 19 whole pages in the tree: the last 8 stay hot as a continuation point, the two sinks only while somebody runs.
    assert sum(tokens.values()) == pages(computed(608))
    assert tokens["fresh"] == 0
    assert 256 <= tokens["32"] < 576
    hot = report["hot_blocks"]
    assert hot["capacity"] - hot["free"] == tokens["32"] // 2
    assert report["rows_with_nan_or_inf"] == 0


def test_tree_of_a_running_server(ours, capsys):
    shared = piece(320, seed=52)
    for seed in (53, 54):
        ours.generate(shared + piece(100, seed=seed), 8)
    settled(ours)
    assert main(["tree", "--url", ours.url, "--json"]) == 0
    (tree,) = json.loads(capsys.readouterr().out)
    by_id = {node["id"]: node for node in tree["nodes"]}
    leaves = [node for node in tree["nodes"] if node["id"] not in {each["parent"] for each in tree["nodes"]}]

    def path(node):
        return [node, *(path(by_id[node["parent"]]) if node["parent"] is not None else [])]

    # Nodes end wherever a match did, so the shared tokens may be several.
    assert [leaf["tokens"] for leaf in leaves] == [96, 96]
    assert path(leaves[0])[1:] == path(leaves[1])[1:]
    assert [sum(node["tokens"] for node in path(leaf)) for leaf in leaves] == [416, 416]
    pages_at = {level: sum(node["levels"][level] for node in tree["nodes"]) for level in tree["nodes"][0]["levels"]}
    usage = ours.kv_quant()["levels"]
    assert {level: 32 * count for level, count in pages_at.items()} == {level: usage[level]["tokens"] for level in pages_at}
    assert all(node["readers"] == 0 and node["mass"] is node["copied"] is None for node in tree["nodes"])
    assert main(["tree", "--url", ours.url]) == 0
    assert capsys.readouterr().out.startswith(f"512 tokens in {len(by_id)} nodes")


def test_periodic_line(ours):
    forwards = ours.kv_quant()["forwards"]
    ours.generate(piece(40, seed=51), 201, ignore_eos=True)
    assert ours.kv_quant()["forwards"] >= forwards + 200
    lines = re.findall(r"kv-quant oscar: level 0: \d+ tokens [\d.]+ MiB, .*hot blocks \d+ of \d+ used, \d+ demotions", log_text(ours))
    assert len(lines) >= ours.kv_quant()["forwards"] // 200
