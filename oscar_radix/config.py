"""The whole configuration: one frozen dataclass, filled from command-line flags."""

from dataclasses import dataclass

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.policy import LEVELS, POLICIES
from oscar_radix.policy.base import LAG

FOLD_VALUES = ("auto", "off")


@dataclass(frozen=True)
class OscarConfig:
    """What `--kv-quant oscar` and the `--oscar-*` flags say.

    Args:
        recipe: name of a codec recipe.
        calibration: calibration file; None means the cached one for this model, made at start-up when there is none.
        policy: what becomes of the hot rows of pages outside every recent window.
        policy_interval: forwards between two decisions of the policy `attention`.
        hot_rows: int8 rows that pages which are read, outside every recent window, keep on average under the policy `attention`.
        recent_tokens: W, the tokens before the end of a sequence that stay at int8.
        hot_fraction: share of the KV byte budget that the hot pool takes.
        host_gib: GiB of this machine's memory for int8 copies of sealed pages, over all its ranks; 0: no copies.
        fold_values: "auto" folds the rotation of V into the model's weights where that is possible, "off" never does.
        log_interval: forwards between two periodic log lines.
    """

    recipe: str
    calibration: str | None = None
    policy: str = "attention"
    policy_interval: int = 64
    hot_rows: float = 1.0
    recent_tokens: int = 256
    hot_fraction: float = 0.12
    host_gib: float = 0.0
    fold_values: str = "auto"
    log_interval: int = 200

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"--oscar-policy {self.policy} is unknown; choose from {sorted(POLICIES)}")
        if self.policy_interval <= LAG:
            raise ValueError(f"--oscar-policy-interval {self.policy_interval} must be above {LAG}, the forwards that a decision takes")
        if not 0.0 < self.hot_rows <= LEVELS[-2]:
            raise ValueError(f"--oscar-hot-rows {self.hot_rows} must be above 0 and at most {LEVELS[-2]}")
        if self.recent_tokens < PAGE_TOKENS or self.recent_tokens % PAGE_TOKENS:
            raise ValueError(
                f"--oscar-recent-tokens {self.recent_tokens} must be a multiple of the page size {PAGE_TOKENS} and at least {PAGE_TOKENS}"
            )
        if not 0.0 < self.hot_fraction <= 0.9:
            raise ValueError(f"--oscar-hot-fraction {self.hot_fraction} must be above 0 and at most 0.9")
        if not 0.0 <= self.host_gib < float("inf"):
            raise ValueError(f"--oscar-host-gib {self.host_gib} must be 0 or more")
        if self.fold_values not in FOLD_VALUES:
            raise ValueError(f"--oscar-fold-values {self.fold_values} is unknown; choose from {', '.join(FOLD_VALUES)}")

    @property
    def recent_pages(self) -> int:
        """Whole pages of the recent window."""
        return self.recent_tokens // PAGE_TOKENS
