"""What an operator sees: a report for /server_info and one-line summaries."""

import math
from typing import Any

from oscar_radix.budget import PoolSizes
from oscar_radix.config import OscarConfig
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.policy import LEVELS
from oscar_radix.pool.store import KVStore

MIB = 2**20


class Metrics:
    """Reads the store; keeps nothing but what it is given."""

    def __init__(self, config: OscarConfig, sizes: PoolSizes, store: KVStore, calibration_source: str):
        self.config = config
        self.sizes = sizes
        self.store = store
        self.calibration_source = calibration_source

    def report(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        store, residency = self.store, self.store.residency
        report = {
            "recipe": self.config.recipe,
            "policy": self.config.policy,
            "calibration": self.calibration_source,
            "page_tokens": PAGE_TOKENS,
            "recent_tokens": self.config.recent_tokens,
            "refined_layers": list(store.codec.refined),
            "values_folded": store.codec.values_folded,
            "kv_budget_bytes": self.sizes.budget_bytes,
            "max_total_num_tokens": self.sizes.tokens,
            "bf16_tokens_at_same_bytes": self.sizes.bf16_tokens,
            "capacity_ratio": self.sizes.capacity_ratio,
            "effective_bits": store.effective_bits,
            "bytes_per_token": sum(store.allocated_bytes.values()) / self.sizes.tokens,
            "allocated_bytes": store.allocated_bytes,
            "levels": store.usage_by_level(),
            "hot_blocks": {"capacity": store.hot.capacity, "free": store.hot.free_blocks},
            "demotions": residency.demotions,
            "demotions_by_level": {str(level): int(residency.demoted_to[level]) for level in LEVELS[:-1]},
            "promotions_by_level": {str(level): self._promotions(level) for level in LEVELS[1:]},
            "promotions_by_source": {"recomputed": store.adopted, "host": self._promotions_from_host()},
            "pages_sealed_without_hot_rows": residency.sealed_without_hot_rows,
            "rows_with_nan_or_inf": int(store.bad_rows),
            "forwards": residency.now,
            "rows_read_from_device": {
                "decode": store.requests.decode_rows_read_back,
                "prefill": store.requests.prefill_rows_read_back,
            },
        }
        if store.copies:
            host = store.copies.host
            held = {"bytes": host.nbytes, "pages": host.capacity, "pages_held": host.pages_held}
            report["host_store"] = {**held, "pages_copied": host.copied, "pages_dropped_for_others": host.dropped}
        if store.mass:
            table, covered = store.mass.table, self._covered_share()
            report["mass"] = {"covered_share": covered, "pages_tracked": table.capacity - table.free_slots, "slots": table.capacity}
        return report

    def _promotions(self, level: int) -> int:
        """Pages that rose to `level`, from whatever source."""
        recomputed = self.store.adopted if level == PAGE_TOKENS else 0
        return recomputed + (int(self.store.copies.promoted_to[level]) if self.store.copies else 0)

    def _promotions_from_host(self) -> int:
        return int(self.store.copies.promoted_to.sum()) if self.store.copies else 0

    def _covered_share(self) -> float | None:
        """Share of the tracked pages' attention mass that lies on hot rows, as of the last decision; None before the first."""
        share = self.store.mass.heat.covered_share
        return None if math.isnan(share) else share

    def startup_lines(self) -> list[str]:
        """Recipe, calibration, capacity against bf16, effective bits."""
        sizes, store = self.sizes, self.store
        held = store.allocated_bytes
        mass = f", attention mass {held['mass'] / MIB:.1f}" if "mass" in held else ""
        rotation = "folded into the weights" if store.codec.values_folded else "at run time"
        refined = ", ".join(map(str, store.codec.refined)) or "none"
        lines = [
            f"kv-quant oscar: recipe {self.config.recipe}, policy {self.config.policy}, recent window {self.config.recent_tokens} tokens, "
            f"calibration {self.calibration_source}; rotation of V {rotation}; refined layers: {refined}",
            f"kv-quant oscar: {sizes.tokens} tokens of KV in {sizes.budget_bytes / MIB:.1f} MiB, {sizes.capacity_ratio:.2f} times the "
            f"{sizes.bf16_tokens} of bf16; {store.effective_bits:.2f} effective bits per element (codes {held['codes'] / MIB:.1f}, scales "
            f"{held['scales'] / MIB:.1f}, hot pool {held['hot_pool'] / MIB:.1f}, tables {held['tables'] / MIB:.2f}, codec parameters "
            f"{held['codec_parameters'] / MIB:.1f}{mass} MiB)",
        ]
        if store.copies:
            host = store.copies.host
            lines.append(
                f"kv-quant oscar: int8 copies of {host.capacity} of {store.pages} pages in {host.nbytes / MIB:.1f} MiB of host memory"
            )
        return lines

    def periodic_line(self) -> str:
        """Tokens and bytes by level, demotions, and how much of the mass is on hot rows where the policy goes by it."""
        usage = self.store.usage_by_level()
        levels = [f"level {level}: {entry['tokens']} tokens {entry['bytes'] / MIB:.1f} MiB" for level, entry in usage.items()]
        hot = self.store.hot
        covered = self._covered_share() if self.store.mass else None
        mass = "" if covered is None else f"{100 * covered:.1f} % of the attention mass on hot rows, "
        return (
            f"kv-quant oscar: {', '.join(levels)}; hot blocks {hot.capacity - hot.free_blocks} of {hot.capacity} used, "
            f"{mass}{self.store.residency.demotions} demotions, promotions: {self.store.adopted} recomputed, "
            f"{self._promotions_from_host()} from host memory, {self.store.poll_bad_rows()} rows with NaN or Inf"
        )
