"""Entry point of the group `sglang.srt.plugins`: registers every hook and factory; without --kv-quant oscar all of them pass through."""

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from oscar_radix.patches import flags, targets


def register() -> None:
    """Called once by SGLang in the launcher and in every scheduler process."""
    # SGLang logs a plugin that fails to load and serves on; then --kv-quant is an unknown flag and the server does not start.
    HookRegistry.register(targets.ADD_CLI_ARGS, flags.add_flags, HookType.AFTER)
    HookRegistry.register(targets.FROM_CLI_ARGS, flags.from_cli_args, HookType.AROUND)
    for target, hook in _scheduler_hooks().items():
        HookRegistry.register(target, hook, HookType.AFTER if target == targets.GET_INTERNAL_STATE else HookType.AROUND)
    _register_factories()


def _scheduler_hooks() -> dict[str, Any]:
    def late(module: str, name: str) -> Any:
        """The hook, imported when it first runs: the launcher process never needs the adapters."""

        def hook(*args: Any, **kwargs: Any) -> Any:
            import importlib

            return getattr(importlib.import_module(f"oscar_radix.patches.{module}"), name)(*args, **kwargs)

        return hook

    return {
        targets.SCHEDULER_INIT: late("scheduler", "scheduler_init"),
        targets.INIT_ALL_CUDA_GRAPHS: late("scheduler", "init_all_cuda_graphs"),
        targets.GET_INTERNAL_STATE: late("scheduler", "get_internal_state"),
        targets.CONFIG_FROM_BUDGET: late("sizing", "config_from_budget"),
        targets.RESOLVE_MAX_NUM_REQS: late("sizing", "resolve_max_num_reqs"),
        targets.BUILD_KV_POOL: late("sizing", "build_kv_pool"),
        targets.INIT_FORWARD_BATCH: late("forward_pages", "init_new"),
        targets.BUILD_ALLOCATOR: late("sizing", "build_allocator"),
    }


def _register_factories() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.server_args import add_attention_backend_choices

    def build_tree(ctx: Any) -> Any:
        from oscar_radix.patches.radix import build_tree

        return build_tree(ctx)

    def oscar(runner: Any) -> Any:
        from oscar_radix.patches.attention import OscarAttentionBackend
        from oscar_radix.patches.runtime import current

        return OscarAttentionBackend(runner, current())

    register_radix_cache_backend(flags.BACKEND, build_tree)
    add_attention_backend_choices([flags.BACKEND])
    ATTENTION_BACKENDS[flags.BACKEND] = oscar
    stock_torch_native = ATTENTION_BACKENDS["torch_native"]

    def torch_native(runner: Any) -> Any:
        return stock_torch_native(runner) if flags.config_of(runner.server_args) is None else oscar(runner)

    ATTENTION_BACKENDS["torch_native"] = torch_native
