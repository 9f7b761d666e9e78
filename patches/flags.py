"""Command-line flags of the plugin, and how they reach the scheduler process."""

import logging
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import torch

from oscar_radix.codec import DEFAULT_RECIPE, RECIPES
from oscar_radix.config import FOLD_VALUES, OscarConfig
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.host_memory import DEFAULT_LEAST_GIB, DEFAULT_SHARE, available_bytes
from oscar_radix.patches.refusals import Refused, refuse_device, refuse_flags, refuse_host_store
from oscar_radix.patches.targets import problems
from oscar_radix.policy import POLICIES

logger = logging.getLogger("oscar_radix")

BACKEND = "oscar"
"""Name of our attention backend on CUDA and of our radix cache backend."""

ATTRIBUTE = "_oscar_config"
"""Attribute of ServerArgs that carries the OscarConfig; underscore names survive SGLang's freezing and pickling."""


class _KvQuantAction(Action):
    """Stores --kv-quant. Asking for `oscar` fails here when the plugin is not fully in place: SGLang itself only logs that."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, value: Any, option_string: str | None = None) -> None:
        found = problems(expect_hooks=True) if value == "oscar" else []
        if found:
            parser.error("--kv-quant oscar cannot start on this SGLang:\n  " + "\n  ".join(found))
        setattr(namespace, self.dest, value)


def add_flags(_result: None, parser: ArgumentParser) -> None:
    """AFTER hook of ServerArgs.add_cli_args."""
    group = parser.add_argument_group("oscar_radix", "a radix prefix cache whose pages are stored in 2 bits")
    group.add_argument(
        "--kv-quant",
        action=_KvQuantAction,
        choices=["none", "oscar"],
        default="none",
        help="'oscar' stores the whole KV cache in 2-bit pages under a pool of int8 rows; 'none' leaves SGLang as it is.",
    )
    group.add_argument(
        "--oscar-recipe",
        choices=list(RECIPES),
        default=DEFAULT_RECIPE,
        help=f"How rows become 2 bits. Default: {DEFAULT_RECIPE}.",
    )
    group.add_argument(
        "--oscar-calibration",
        metavar="FILE",
        default=None,
        help="Calibration made by 'oscar-radix calibrate'. Without it the one cached for this model is used, or made at start-up from a "
        "bundled text.",
    )
    group.add_argument(
        "--oscar-policy",
        choices=list(POLICIES),
        default=OscarConfig.policy,
        help="What becomes of int8 rows outside the recent windows: 'none' drops them at once, 'window' keeps whole pages until the pool "
        "needs their bytes (more precise while it has room, slower), 'random' keeps 2 random rows a page, 'attention' keeps those "
        f"that attention reads most, --oscar-hot-rows a page. Default: {OscarConfig.policy}.",
    )
    group.add_argument(
        "--oscar-policy-interval",
        type=int,
        default=OscarConfig.policy_interval,
        help=f"Forwards between two decisions of --oscar-policy attention. Default: {OscarConfig.policy_interval}.",
    )
    group.add_argument(
        "--oscar-hot-rows",
        type=float,
        default=OscarConfig.hot_rows,
        help="int8 rows that the pages which are read keep on average under --oscar-policy attention, more where attention is and none "
        f"where it is not: every step reads them, so fewer are faster and more are more precise. Default: {OscarConfig.hot_rows}.",
    )
    group.add_argument(
        "--oscar-recent-tokens",
        type=int,
        default=OscarConfig.recent_tokens,
        help=f"Tokens before the end of a sequence that stay at int8; a multiple of {PAGE_TOKENS}. Default: {OscarConfig.recent_tokens}.",
    )
    group.add_argument(
        "--oscar-hot-fraction",
        type=float,
        default=OscarConfig.hot_fraction,
        help=f"Share of the KV byte budget for the pool of int8 rows. Default: {OscarConfig.hot_fraction}.",
    )
    group.add_argument(
        "--oscar-host-gib",
        type=float,
        default=None,
        help="GiB of host memory, pinned on GPU hosts, for int8 copies of cached pages: readers that continue from a prefix get its recent "
        "window back from there, and --oscar-policy attention raises pages that have become hot. 0: no copies. Default: on GPUs "
        f"{DEFAULT_SHARE:.0%}% of the memory that is available at the start, if all ranks are on this machine; 0 on CPUs.",
    )
    group.add_argument(
        "--oscar-fold-values",
        choices=list(FOLD_VALUES),
        default=OscarConfig.fold_values,
        help="'auto' folds the rotation of V into the value and output projections where the model allows it (faster; weights then cannot "
        f"be updated or exported while the server runs), 'off' rotates at run time. Default: {OscarConfig.fold_values}.",
    )


def from_cli_args(original: Callable[..., Any], cls: type, args: Namespace) -> Any:
    """AROUND hook of ServerArgs.from_cli_args: refuse what cannot work, choose what must be, attach the configuration."""
    if getattr(args, "kv_quant", "none") != "oscar":
        return original(cls, args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    copies_used = POLICIES[args.oscar_policy].by_mass or not args.disable_radix_cache
    try:
        config = OscarConfig(
            recipe=args.oscar_recipe,
            calibration=args.oscar_calibration,
            policy=args.oscar_policy,
            policy_interval=args.oscar_policy_interval,
            hot_rows=args.oscar_hot_rows,
            recent_tokens=args.oscar_recent_tokens,
            hot_fraction=args.oscar_hot_fraction,
            host_gib=_host_gib(args, device, copies_used),
            fold_values=args.oscar_fold_values,
        )
        refuse_device(device, config.recipe)
        refuse_host_store(config.host_gib, copies_used)
        refuse_flags(args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from (None if isinstance(error, Refused) else error)
    args.page_size = PAGE_TOKENS
    args.radix_cache_backend = BACKEND
    if device == "cpu":
        # Our backend stands in the place of SGLang's torch_native one, which switches CUDA graphs off by itself.
        args.attention_backend = "torch_native"
        args.disable_overlap_schedule = True
    else:
        args.attention_backend = BACKEND
        if not args.disable_prefill_cuda_graph:
            logger.info("kv-quant oscar: prefill CUDA graphs are switched off; decode graphs stay on")
        args.disable_prefill_cuda_graph = True
    server_args = original(cls, args)
    object.__setattr__(server_args, ATTRIBUTE, config)
    return server_args


def _host_gib(args: Namespace, device: str, used: bool) -> float:
    """What --oscar-host-gib says, or its default: none where it is not `used` (`refuse_host_store`), nor on several machines, since all
    ranks must have equal stores."""
    if args.oscar_host_gib is not None:
        return args.oscar_host_gib
    if device != "cuda" or args.nnodes > 1 or not used:
        return 0.0
    share = round(DEFAULT_SHARE * available_bytes() / 2**30, 1)
    return share if share >= DEFAULT_LEAST_GIB else 0.0


def config_of(server_args: Any) -> OscarConfig | None:
    """The configuration that `from_cli_args` attached; None when the server runs without --kv-quant oscar."""
    return getattr(server_args, ATTRIBUTE, None)
