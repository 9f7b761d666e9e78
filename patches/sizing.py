"""Hooks on SGLang's pool sizing: the same byte budget, more tokens; then our pool and allocator instead of SGLang's."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sglang.srt.layers.dp_attention import attn_tp_all_reduce
from sglang.srt.runtime_context import get_parallel, get_schedule

from oscar_radix.budget import host_pages, split_budget
from oscar_radix.codec import get_recipe
from oscar_radix.codec.parameters import parameter_bytes, placeholder
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.patches.allocator import OscarPageAllocator
from oscar_radix.patches.flags import config_of
from oscar_radix.patches.pool import OscarKVPool
from oscar_radix.patches.refusals import refuse_model
from oscar_radix.patches.runtime import Runtime, current, install
from oscar_radix.policy import POLICIES
from oscar_radix.pool.store import KVStore
from oscar_radix.sequence import SINK_PAGES


def config_from_budget(original: Callable[..., Any], self: Any, budget_bytes: int, *, cap_tokens: int | None = None) -> Any:
    """AROUND: SGLang decides how many bf16 tokens fit (memory fraction, --max-total-tokens); their bytes are our budget."""
    config = config_of(self.server_args)
    stock = original(self, budget_bytes, cap_tokens=cap_tokens)
    if config is None:
        return stock
    refuse_model(self)
    if self.post_capture_kv_active:
        raise ValueError("--kv-quant oscar: SGLANG_ENABLE_POST_CAPTURE_KV_SIZING resizes the pool after it is built; unset it")
    geometry = _geometry(self)
    recipe = get_recipe(config.recipe)
    schedule = get_schedule()
    chunk = schedule.chunked_prefill_size
    sizes = split_budget(
        budget_bytes=stock.max_total_num_tokens * geometry.kv_elements_per_token * 2,
        geometry=geometry,
        layout=recipe.layout(geometry.head_dim),
        hot_fraction=config.hot_fraction,
        parameter_bytes=parameter_bytes(recipe, geometry),
        running_requests=schedule.max_running_requests,
        prefill_tokens=chunk if chunk and chunk > 0 else None,
        by_mass=POLICIES[config.policy].by_mass,
        graphs=self.device != "cpu",
        refined=recipe.refined_layers(geometry.layers),
    )
    ranks = max(1, self.server_args.tp_size // self.server_args.nnodes)
    copies = host_pages(config.host_gib, ranks, geometry, sizes.pages, config.recent_pages + SINK_PAGES)
    sizes = dataclasses.replace(sizes, host_pages=copies)
    install(Runtime(config, geometry, sizes))
    return dataclasses.replace(stock, max_total_num_tokens=sizes.tokens)


def resolve_max_num_reqs(original: Callable[..., Any], self: Any, token_capacity: int) -> int:
    """AROUND: never more running requests than the hot pool has fresh pages for.

    One page stays over: a prompt whose last chunk ended within a page holds two while its next chunk crosses the end of it.
    """
    requests = original(self, token_capacity)
    return requests if config_of(self.server_args) is None else min(requests, max(1, current().sizes.hot_pages - 1))


def build_kv_pool(original: Callable[..., Any], self: Any, **kwargs: Any) -> Any:
    """AROUND: our pool instead of SGLang's."""
    config = config_of(self.server_args)
    if config is None:
        return original(self, **kwargs)
    runtime = current()
    geometry = runtime.geometry
    runtime.store = KVStore(
        geometry=geometry,
        layout=get_recipe(config.recipe).layout(geometry.head_dim),
        pages=kwargs["sizes"].max_total_num_tokens // PAGE_TOKENS,
        hot_blocks=runtime.sizes.hot_blocks,
        policy=POLICIES[config.policy](),
        recent_tokens=config.recent_tokens,
        device=self.device,
        policy_interval=config.policy_interval,
        hot_rows=config.hot_rows,
        sampled_queries=runtime.sizes.sampled_queries,
        host_pages=runtime.sizes.host_pages,
        refined=get_recipe(config.recipe).refined_layers(geometry.layers),
    )
    if runtime.store.mass and get_parallel().attn_tp_size > 1:
        runtime.store.mass.heat.reduce = attn_tp_all_reduce
    # The attention backend is built before there is a calibration; its parameters come to the placeholder's addresses.
    runtime.store.codec = placeholder(get_recipe(config.recipe), geometry, self.device)
    return OscarKVPool(
        runtime.store,
        size=kwargs["sizes"].max_total_num_tokens,
        dtype=self.kv_cache_dtype,
        device=self.device,
        start_layer=self.layer_info.start_layer,
        end_layer=self.layer_info.end_layer,
    )


def build_allocator(original: Callable[..., Any], self: Any, **kwargs: Any) -> Any:
    """AROUND: an allocator that tells the store who owns its pages."""
    if config_of(self.server_args) is None:
        return original(self, **kwargs)
    return OscarPageAllocator(
        store=current().store,
        size=kwargs["sizes"].max_total_num_tokens,
        dtype=self.kv_cache_dtype,
        device=self.device,
        kvcache=kwargs["token_to_kv_pool"],
    )


def _geometry(configurator: Any) -> Geometry:
    tensor_parallel = get_parallel().attn_tp_size
    model = configurator.model_config
    return Geometry(
        layers=configurator.layer_info.num_effective_layers,
        kv_heads=model.get_num_kv_heads(tensor_parallel),
        query_heads=model.num_attention_heads // tensor_parallel,
        head_dim=model.head_dim,
    )
