"""The SGLang functions that the plugin hooks, with the signatures it was written against, and the check that all hold."""

import importlib
import inspect
import pkgutil

SUPPORTED_VERSIONS = ("0.5.17",)

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"

ADD_CLI_ARGS = f"{_SERVER_ARGS}.add_cli_args"
FROM_CLI_ARGS = f"{_SERVER_ARGS}.from_cli_args"
SCHEDULER_INIT = f"{_SCHEDULER}.__init__"
INIT_ALL_CUDA_GRAPHS = f"{_SCHEDULER}.init_all_cuda_graphs"
GET_INTERNAL_STATE = f"{_SCHEDULER}.get_internal_state"
CONFIG_FROM_BUDGET = f"{_CONFIGURATOR}.config_from_budget"
RESOLVE_MAX_NUM_REQS = f"{_CONFIGURATOR}.resolve_max_num_reqs"
BUILD_KV_POOL = f"{_CONFIGURATOR}._build_token_to_kv_pool"
INIT_FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
BUILD_ALLOCATOR = f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator"

HOOKED: dict[str, tuple[str, ...]] = {
    ADD_CLI_ARGS: ("parser",),
    FROM_CLI_ARGS: ("cls", "args"),
    SCHEDULER_INIT: (
        "self", "server_args", "port_args", "gpu_id", "tp_rank", "moe_ep_rank", "pp_rank", "attn_cp_rank", "moe_dp_rank", "dp_rank",
    ),
    INIT_ALL_CUDA_GRAPHS: ("self",),
    GET_INTERNAL_STATE: ("self", "recv_req"),
    CONFIG_FROM_BUDGET: ("self", "budget_bytes", "cap_tokens"),
    RESOLVE_MAX_NUM_REQS: ("self", "token_capacity"),
    BUILD_KV_POOL: ("self", "sizes", "is_dsa_model", "is_dsv4_model", "req_to_token_pool"),
    INIT_FORWARD_BATCH: ("cls", "batch", "model_runner", "capture_hidden_mode", "return_hidden_states_before_norm"),
    BUILD_ALLOCATOR: ("self", "sizes", "token_to_kv_pool", "is_dsv4_model", "req_to_token_pool", "token_to_kv_pool_allocator"),
}  # fmt: skip
"""Hook target -> parameter names of the original."""

CALLED: dict[str, tuple[str, ...]] = {
    "sglang.srt.mem_cache.radix_cache.RadixCache.insert": ("self", "params"),
    "sglang.srt.mem_cache.radix_cache.RadixCache.match_prefix": ("self", "params"),
    "sglang.srt.mem_cache.radix_cache.RadixCache.cache_finished_req": ("self", "req", "is_insert", "kv_len_to_handle"),
    "sglang.srt.mem_cache.radix_cache.RadixCache.cache_unfinished_req": ("self", "req", "chunked"),
    "sglang.srt.mem_cache.radix_cache.RadixCache._match_prefix_helper": ("self", "node", "key"),
    "sglang.srt.mem_cache.radix_cache.RadixCache._split_node": ("self", "key", "child", "split_len"),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator._release_page_ids": ("self", "page_ids"),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.free_segment": ("self", "free_index", "start_pos"),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.free_group_begin": ("self",),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.free_group_end": ("self",),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_extend": (
        "self", "prefix_lens", "prefix_lens_cpu", "seq_lens", "seq_lens_cpu", "last_loc", "extend_num_tokens", "num_new_pages",
    ),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_decode": ("self", "seq_lens", "seq_lens_cpu", "last_loc"),
    "sglang.srt.mem_cache.registry.register_radix_cache_backend": ("name", "factory"),
}  # fmt: skip
"""Functions that the adapters override or call -> parameter names."""


def problems(expect_hooks: bool) -> list[str]:
    """Everything about this SGLang that does not fit; empty when all is well.

    Args:
        expect_hooks: also require that every hook is in place (after SGLang applied them).
    """
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.version import __version__ as version

    found = []
    if version not in SUPPORTED_VERSIONS:
        found.append(f"SGLang is {version}; supported: {', '.join(SUPPORTED_VERSIONS)}")
    for target, expected in {**HOOKED, **CALLED}.items():
        try:
            actual = _parameters(target)
        except (ImportError, AttributeError) as error:
            found.append(f"{target} does not exist: {error}")
            continue
        if actual != expected:
            found.append(f"{target} takes {actual}, expected {expected}")
    if expect_hooks:
        found.extend(f"hook on {target} is not applied" for target in HOOKED if target not in HookRegistry._patched)
    return found


def _parameters(target: str) -> tuple[str, ...]:
    path, name = target.rsplit(".", 1)
    try:
        owner = importlib.import_module(path)
    except ImportError:
        owner = pkgutil.resolve_name(path)
    function = owner.__dict__[name] if name in vars(owner) else getattr(owner, name)
    function = getattr(function, "__func__", function)
    return tuple(inspect.signature(inspect.unwrap(function)).parameters)
