"""The report's keys and numbers, its table and its picture."""

import pytest

from benchmarks.demo import plot, report
from benchmarks.demo.quality import Quality
from benchmarks.demo.workload import Replay, Turn

CONFIG = {"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64}
KV_QUANT = {
    "effective_bits": 2.4,
    "kv_budget_bytes": 1000,
    "allocated_bytes": {"codes": 700, "hot": 250},
    "levels": {"0": {"tokens": 50, "bytes": 700}, "32": {"tokens": 10, "bytes": 250}},
    "bytes_per_token": 3500.0,
}
QUALITY = Quality(mean_kl=0.05, median_kl=0.02, top1_agreement=0.9, positions=1000, covered_mass=0.99, cached_share=0.97)


@pytest.fixture
def result():
    replay = Replay(turns=[Turn(0, 1, 100, 0, 8), Turn(0, 2, 200, 150, 8)])
    bf16 = report.server_summary(replay, {"max_total_num_tokens": 100}, 23040)
    oscar = report.server_summary(replay, {"max_total_num_tokens": 600}, 3500.0)
    return report.assemble("0.5.17", 1000, bf16, oscar, KV_QUANT, QUALITY)


def test_bytes_of_the_embedded_model():
    assert report.bf16_bytes_per_token(CONFIG) == 23040


def test_keys_are_those_that_were_promised(result):
    top = ["sglang_version", "kv_budget_bytes", "bf16", "oscar", "capacity_ratio", "effective_bits", "quality"]
    assert list(result) == top
    for name in ("bf16", "oscar"):
        keys = ["max_total_num_tokens", "prompt_tokens", "cached_tokens", "hit_rate", "bytes_per_token", "turns"]
        assert list(result[name]) == keys
        assert list(result[name]["turns"][0]) == ["turn", "prompt_tokens", "cached_tokens"]
    assert list(result["quality"]) == ["mean_kl", "top1_agreement", "positions"]


def test_ratios(result):
    assert result["capacity_ratio"] == 6.0
    assert result["bf16"]["hit_rate"] == 0.5
    assert result["effective_bits"] == 2.4


def test_more_bytes_than_the_budget_is_an_error(result):
    with pytest.raises(report.BudgetError, match=r"allocated 950 bytes .* budget is 900"):
        report.assemble("0.5.17", 900, result["bf16"], result["oscar"], KV_QUANT, QUALITY)


def test_table_shows_both_servers_and_the_quality(result):
    text = report.table(result, QUALITY, KV_QUANT["levels"])
    for part in ("bf16", "oscar", "capacity ratio 6.00", "2.40", "75.0%", "0.0500 nats (median 0.0200)", "90.0%", "99.00%", "32: 10 / 250"):
        assert part in text


def test_picture(result, tmp_path):
    path = tmp_path / "report.png"
    plot.draw(result, [KV_QUANT, KV_QUANT], path)
    assert path.read_bytes().startswith(b"\x89PNG")
