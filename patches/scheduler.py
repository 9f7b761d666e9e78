"""Hooks on the scheduler: refuse to start unless the plugin is whole, calibrate, report."""

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_parallel

from oscar_radix.codec import get_recipe
from oscar_radix.metrics import Metrics
from oscar_radix.patches.flags import config_of
from oscar_radix.patches.fold_values import fold_weights
from oscar_radix.patches.radix import OscarRadixCache
from oscar_radix.patches.refusals import freeze_weights
from oscar_radix.patches.runtime import current
from oscar_radix.patches.startup_calibration import load_or_calibrate
from oscar_radix.patches.targets import problems
from oscar_radix.pool.digest import host_state_digest

logger = logging.getLogger("oscar_radix")


def scheduler_init(original: Callable[..., None], self: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND Scheduler.__init__."""
    config = config_of(server_args)
    if config is None:
        original(self, server_args, *args, **kwargs)
        return
    found = problems(expect_hooks=True)
    if found:
        raise RuntimeError("--kv-quant oscar cannot start on this SGLang:\n  " + "\n  ".join(found))
    original(self, server_args, *args, **kwargs)
    runtime = current()
    missing = [name for name, part in (("store", runtime.store), ("attention backend", runtime.attention)) if part is None]
    if not (server_args.disable_radix_cache or isinstance(self.tree_cache, OscarRadixCache)):
        missing.append("radix cache")
    if missing:
        raise RuntimeError(f"--kv-quant oscar: SGLang did not build our {', '.join(missing)}; refusing to serve bf16 silently")
    runner = self.tp_worker.model_runner
    calibration, source = load_or_calibrate(runner, self.tokenizer, config, runtime.geometry)
    codec = get_recipe(config.recipe).codec(calibration, runtime.store.device)
    if runtime.store.codec.values_folded:
        freeze_weights(self)
        fold_weights(runner.model, server_args, codec.value_rotation)
        codec.fold_values()
    runtime.store.codec.assign(codec)
    runtime.metrics = Metrics(config, runtime.sizes, runtime.store, source)
    for line in runtime.metrics.startup_lines():
        logger.info(line)


def get_internal_state(result: Any, self: Any, recv_req: Any) -> Any:
    """AFTER Scheduler.get_internal_state: the report under `kv_quant` in /server_info."""
    if config_of(self.server_args) is None:
        return None
    tree = self.tree_cache.describe() if isinstance(self.tree_cache, OscarRadixCache) else None
    result.internal_state["kv_quant"] = {**current().metrics.report(), "integrity": _integrity(self.tree_cache), "tree": tree}
    return result


def _integrity(tree: Any) -> str:
    """What is wrong here or between ranks. All ranks handle the same request at the same point, so that they can compare notes."""
    group = get_parallel().attn_tp_group
    if group.world_size > 1 and len(digests := set(group.all_gather_object(host_state_digest(current().store)))) > 1:
        logger.error("kv-quant oscar: tensor-parallel ranks hold different pages at different levels")
        return f"{group.world_size} tensor-parallel ranks have {len(digests)} different page tables"
    if not isinstance(tree, OscarRadixCache):
        return "not checked: the radix cache is off"
    try:
        tree.check_integrity()
    except RuntimeError as error:
        logger.error("kv-quant oscar: integrity check failed: %s", error)
        return str(error)
    return "ok"
