"""What `--kv-quant oscar` refuses, at start and, once weights are folded, at run time: what, why, and what to do instead."""

import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from oscar_radix.geometry import PAGE_TOKENS, SUPPORTED_HEAD_DIMS
from oscar_radix.host_memory import available_bytes

logger = logging.getLogger("oscar_radix")


class Refused(ValueError):
    """A combination of flags or a model that cannot work with --kv-quant oscar."""


@dataclass(frozen=True)
class Rule:
    """Refuse when `applies` says so; `message` names what, why and what to do instead."""

    applies: Callable[[Namespace], bool]
    message: str


def _flag(name: str, *neutral: object) -> Callable[[Namespace], bool]:
    """True where the flag is set to anything but None, False or one of `neutral`."""
    return lambda args: getattr(args, name, None) not in (None, False, *neutral)


def _at_least_two(name: str) -> Callable[[Namespace], bool]:
    return lambda args: (getattr(args, name, None) or 1) > 1


FLAG_RULES: tuple[Rule, ...] = (
    Rule(
        _flag("kv_cache_dtype", "auto", "bf16", "bfloat16"),
        "--kv-cache-dtype {kv_cache_dtype}: rows are int8 first and 2 bits after; drop the flag, or drop --kv-quant oscar",
    ),
    Rule(
        _flag("page_size", PAGE_TOKENS),
        f"--page-size {{page_size}}: a page is sealed as {PAGE_TOKENS} tokens; drop the flag or set --page-size {PAGE_TOKENS}",
    ),
    Rule(
        _flag("speculative_algorithm"),
        "--speculative-algorithm {speculative_algorithm}: draft tokens would be sealed before they are accepted; drop the flag",
    ),
    Rule(
        _flag("disaggregation_mode", "null"),
        "--disaggregation-mode {disaggregation_mode}: packed pages cannot be transferred between servers yet; serve without disaggregation",
    ),
    Rule(
        _flag("enable_hierarchical_cache"),
        "--enable-hierarchical-cache: HiCache copies bf16 rows, there are none; drop the flag",
    ),
    Rule(_flag("enable_lmcache"), "--enable-lmcache: LMCache copies bf16 rows, there are none; drop the flag"),
    Rule(_flag("enable_flexkv"), "--enable-flexkv: FlexKV copies bf16 rows, there are none; drop the flag"),
    Rule(
        _at_least_two("pp_size"),
        "--pipeline-parallel-size {pp_size}: ranks would hold different layers of a page's calibration; use --tensor-parallel-size",
    ),
    Rule(
        _at_least_two("dcp_size"),
        "--decode-context-parallel-size {dcp_size}: pages would be spread over ranks token by token; use --tensor-parallel-size",
    ),
    Rule(_at_least_two("attn_cp_size"), "--attn-cp-size {attn_cp_size}: context parallelism splits pages; use --tensor-parallel-size"),
    Rule(
        _flag("enable_deterministic_inference"),
        "--enable-deterministic-inference: a page's precision depends on the traffic before; drop the flag",
    ),
    Rule(_flag("enable_streaming_session"), "--enable-streaming-session: a session's pages outlive their request; drop the flag"),
    Rule(_flag("enable_session_radix_cache"), "--enable-session-radix-cache: needs SGLang's unified tree; drop the flag"),
    Rule(_flag("enable_hisparse"), "--enable-hisparse: has a pool of its own; drop the flag"),
    Rule(_flag("enable_unified_memory"), "--enable-unified-memory: has a pool of its own; drop the flag"),
    Rule(_flag("enable_page_major_kv_layout"), "--enable-page-major-kv-layout: has a pool of its own; drop the flag"),
    Rule(_flag("prefill_only_disable_kv_cache"), "--prefill-only-disable-kv-cache: there is no cache to quantise; drop one of the two"),
    Rule(_flag("enable_two_batch_overlap"), "--enable-two-batch-overlap: two batches would plan one pool at once; drop the flag"),
    Rule(_flag("enable_pdmux"), "--enable-pdmux: prefill and decode would plan one pool at once; drop the flag"),
    Rule(_flag("enable_dp_attention"), "--enable-dp-attention: idle ranks are not planned yet; use --tensor-parallel-size"),
    Rule(_flag("enable_torch_compile"), "--enable-torch-compile: the attention backend is not traceable; drop the flag"),
    Rule(_flag("enable_mixed_chunk"), "--enable-mixed-chunk: decode tokens would be planned as prompts; drop the flag"),
    Rule(_flag("enable_memory_saver"), "--enable-memory-saver: the pool cannot be released and restored yet; drop the flag"),
    Rule(_flag("kv_canary", "none"), "--kv-canary {kv_canary}: hashes bf16 rows, there are none; drop the flag"),
    Rule(_flag("dllm_algorithm"), "--dllm-algorithm {dllm_algorithm}: rewrites cached tokens; drop the flag"),
    Rule(
        _flag("radix_cache_backend", "oscar"),
        "--radix-cache-backend {radix_cache_backend}: page states live in our own tree adapter; drop the flag",
    ),
    Rule(
        _flag("attention_backend", "torch_native", "oscar"),
        "--attention-backend {attention_backend}: reads bf16 rows, there are none; drop the flag, the right backend is chosen",
    ),
    Rule(
        _flag("prefill_attention_backend", "torch_native"),
        "--prefill-attention-backend {prefill_attention_backend}: reads bf16 rows; drop the flag",
    ),
    Rule(
        _flag("decode_attention_backend", "torch_native"),
        "--decode-attention-backend {decode_attention_backend}: reads bf16 rows; drop the flag",
    ),
)


RECIPES_WITH_KERNELS = ("tck", "mulm")
HEAD_DIMS_WITH_KERNELS = (64, 128)


def refuse_device(device: str, recipe: str) -> None:
    """CPU and CUDA; on CUDA only recipes that have kernels."""
    if device not in ("cpu", "cuda"):
        raise Refused(f"--kv-quant oscar cannot serve on device '{device}': it has kernels for CUDA and a plain-torch path for CPUs")
    if device == "cuda" and recipe not in RECIPES_WITH_KERNELS:
        raise Refused(
            f"--oscar-recipe {recipe} has no GPU kernels, only the plain-torch path for CPUs; use one of {', '.join(RECIPES_WITH_KERNELS)}"
        )


def refuse_host_store(host_gib: float, used: bool) -> None:
    """Raise Refused when this machine has not that much memory left, or nothing would ever come back from there.

    Args:
        host_gib: asked for.
        used: there is a radix cache, or a policy that raises pages.
    """
    if host_gib and not used:
        raise Refused(
            f"--oscar-host-gib {host_gib:g} with --disable-radix-cache: no reader continues from a cached prefix, so copies would never be "
            f"read; drop one of the two, or use --oscar-policy attention"
        )
    available = available_bytes() / 2**30
    if host_gib > available:
        raise Refused(f"--oscar-host-gib {host_gib:g}: this machine has {available:.1f} GiB of memory available; ask for less")


def refuse_flags(args: Namespace) -> None:
    """Raise Refused with every flag that does not go with --kv-quant oscar, one line each."""
    broken = [rule.message.format(**vars(args)) for rule in FLAG_RULES if rule.applies(args)]
    if broken:
        raise Refused("--kv-quant oscar does not go with:\n  " + "\n  ".join(broken))


def refuse_model(configurator: object) -> None:
    """Raise Refused for models whose cache is not plain multi-head or grouped-query attention.

    Args:
        configurator: SGLang's KVCacheConfigurator.
    """
    model = configurator.model_config
    name = ", ".join(getattr(model.hf_config, "architectures", None) or ["unknown"])
    supported = SUPPORTED_HEAD_DIMS if configurator.device == "cpu" else HEAD_DIMS_WITH_KERNELS
    reason = None
    if configurator.use_mla_backend:
        reason = "uses multi-head latent attention (MLA), whose latent rows have no heads"
    elif configurator.is_hybrid_swa:
        reason = "has sliding-window layers, whose pages expire one by one"
    elif configurator.mambaish_config is not None:
        reason = "mixes attention with state-space layers, whose states are not pages"
    elif model.is_encoder_decoder:
        reason = "has cross-attention, whose keys are not a prefix"
    elif not model.is_generation:
        reason = "is served for embeddings, which keep no prefix cache"
    elif model.head_dim not in supported or model.v_head_dim != model.head_dim:
        dims = f"{model.head_dim} (K) and {model.v_head_dim} (V)"
        reason = f"has head dims {dims}; supported on {configurator.device} are equal ones of {supported}"
    if reason:
        raise Refused(f"--kv-quant oscar: {name} {reason}; serve it without --kv-quant")


FOLDED = (
    "the rotation of V is folded into this server's value and output projections, so weights from elsewhere do not fit it and its own fit "
    "no other server; start it with --oscar-fold-values off"
)


def freeze_weights(scheduler: Any) -> None:
    """From now on the scheduler refuses requests that would replace, export or compare weights; their senders get FOLDED as the reason.

    /get_weights_by_name has no place for a reason: it fails, and the log has it.
    """
    from sglang.srt.managers import io_struct

    answers = {
        io_struct.UpdateWeightFromDiskReqInput: io_struct.UpdateWeightFromDiskReqOutput,
        io_struct.InitWeightsUpdateGroupReqInput: io_struct.InitWeightsUpdateGroupReqOutput,
        io_struct.UpdateWeightsFromDistributedReqInput: io_struct.UpdateWeightsFromDistributedReqOutput,
        io_struct.UpdateWeightsFromTensorReqInput: io_struct.UpdateWeightsFromTensorReqOutput,
        io_struct.UpdateWeightsFromIPCReqInput: io_struct.UpdateWeightsFromIPCReqOutput,
        io_struct.InitWeightsSendGroupForRemoteInstanceReqInput: io_struct.InitWeightsSendGroupForRemoteInstanceReqOutput,
        io_struct.SendWeightsToRemoteInstanceReqInput: io_struct.SendWeightsToRemoteInstanceReqOutput,
        io_struct.CheckWeightsReqInput: io_struct.CheckWeightsReqOutput,
    }
    dispatch = scheduler._request_dispatcher

    def guarded(request: Any) -> Any:
        answer = answers.get(type(request))
        by_name = isinstance(request, io_struct.GetWeightsByNameReqInput)
        if answer is None and not by_name:
            return dispatch(request)
        logger.error("kv-quant oscar: %s refused: %s", type(request).__name__, FOLDED)
        return io_struct.GetWeightsByNameReqOutput(parameter=None) if by_name else answer(success=False, message=FOLDED)

    def refuse(**_: Any) -> NoReturn:
        raise Refused(f"--kv-quant oscar: {FOLDED}")

    scheduler._request_dispatcher = guarded
    # Called by name from remote procedure calls, which hand an error back.
    scheduler.save_remote_model = scheduler.save_sharded_model = refuse
