"""What one scheduler process shares between the hooks: the store, its sizes, and what reports on them."""

import logging
from dataclasses import dataclass
from typing import Any

from oscar_radix.budget import PoolSizes
from oscar_radix.config import OscarConfig
from oscar_radix.geometry import Geometry
from oscar_radix.metrics import Metrics
from oscar_radix.pool.store import KVStore

logger = logging.getLogger("oscar_radix")


@dataclass
class Runtime:
    """Filled in the order of SGLang's start-up: sizes, store, attention, calibration, metrics."""

    config: OscarConfig
    geometry: Geometry
    sizes: PoolSizes
    store: KVStore | None = None
    attention: Any = None
    calibration_source: str | None = None
    """Where the calibration came from, for logs; None until the store's codec has it."""
    metrics: Metrics | None = None

    def log_periodically(self) -> None:
        """One line every `log_interval` forwards."""
        if self.metrics and self.store.residency.now % self.config.log_interval == 0:
            logger.info(self.metrics.periodic_line())


_runtime: Runtime | None = None


def refuse_unbuilt(**parts: Any) -> None:
    """Raise RuntimeError with the names of the parts that are None: what SGLang did not build through our hooks."""
    missing = [name.replace("_", " ") for name, part in parts.items() if part is None]
    if missing:
        raise RuntimeError(f"--kv-quant oscar: SGLang did not build our {', '.join(missing)}; refusing to serve bf16 silently")


def install(runtime: Runtime) -> None:
    """Make `runtime` the one of this process."""
    global _runtime
    _runtime = runtime


def current() -> Runtime:
    """The runtime of this process; it exists from the sizing of the KV pool on."""
    if _runtime is None:
        raise RuntimeError("the KV pool is not sized yet: the hook on KVCacheConfigurator.config_from_budget did not run")
    return _runtime
