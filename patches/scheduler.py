"""Hooks on the scheduler: refuse to start unless the plugin is whole, calibrate, report."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from oscar_radix.codec import get_recipe
from oscar_radix.metrics import Metrics
from oscar_radix.patches.flags import config_of
from oscar_radix.patches.fold_values import fold_weights
from oscar_radix.patches.radix import OscarRadixCache
from oscar_radix.patches.refusals import freeze_weights
from oscar_radix.patches.runtime import Runtime, current, refuse_unbuilt
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
    tree = server_args.disable_radix_cache or isinstance(self.tree_cache, OscarRadixCache) or None
    refuse_unbuilt(store=runtime.store, attention_backend=runtime.attention, radix_cache=tree)
    if runtime.calibration_source is None:
        raise RuntimeError("--kv-quant oscar: SGLang did not call Scheduler.init_all_cuda_graphs, so that nothing is calibrated")
    if runtime.store.codec.values_folded:
        freeze_weights(self)
    runtime.metrics = Metrics(config, runtime.sizes, runtime.store, runtime.calibration_source)
    for line in runtime.metrics.startup_lines():
        logger.info(line)


def init_all_cuda_graphs(original: Callable[..., None], self: Any) -> None:
    """AROUND Scheduler.init_all_cuda_graphs, which CPU servers call too: calibrate once, before anything is captured or warmed up."""
    config = config_of(self.server_args)
    if config is not None:
        runtime = current()
        refuse_unbuilt(store=runtime.store, attention_backend=runtime.attention)
        if runtime.calibration_source is None:
            runtime.calibration_source = _calibrate(self, runtime)
            # Graphs have memory pools of their own, which get nothing of what calibration leaves in the allocator's cache.
            torch.cuda.empty_cache()
    original(self)


def _calibrate(scheduler: Any, runtime: Runtime) -> str:
    """Fill the store's codec and, where it says so, fold the weights; returns where the calibration came from."""
    runner = scheduler.tp_worker.model_runner
    calibration, source = load_or_calibrate(runner, scheduler.tokenizer, runtime.config, runtime.geometry)
    codec = get_recipe(runtime.config.recipe).codec(calibration, runtime.store.device)
    if runtime.store.codec.values_folded:
        fold_weights(runner.model, scheduler.server_args, codec.value_rotation)
        codec.fold_values()
    runtime.store.codec.assign(codec)
    return source


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
