"""Calibration at start-up: the file that the user names, the cached one, or a new one from a bundled text."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel

from oscar_radix.calibration.builtin_text import builtin_text
from oscar_radix.calibration.cache import cache_path, load_cached, store_cached
from oscar_radix.calibration.file import check_fits, load_calibration
from oscar_radix.calibration.fingerprint import model_fingerprint, text_fingerprint
from oscar_radix.calibration.moments import MomentAccumulator
from oscar_radix.calibration.predicted import fit
from oscar_radix.calibration.sequences import placed_sequences
from oscar_radix.codec import Calibration, CalibrationError, get_recipe
from oscar_radix.config import OscarConfig
from oscar_radix.geometry import Geometry
from oscar_radix.patches.attention import OscarAttentionBackend

logger = logging.getLogger("oscar_radix")

CALIBRATION_TOKENS = 8192
"""Tokens of the bundled text that are used at most."""


def load_or_calibrate(runner: Any, tokenizer: Any, config: OscarConfig, geometry: Geometry) -> tuple[Calibration, str]:
    """The calibration of this rank, and where it came from (for logs).

    Raises:
        CalibrationError: when the named file does not fit, or when there is no tokenizer to calibrate with.
    """
    folder = _model_folder(runner.model_config.model_path)
    fingerprint = model_fingerprint(folder)
    parallel = get_parallel()
    rank, size = parallel.attn_tp_rank, parallel.attn_tp_size
    if config.calibration:
        calibration = load_calibration(config.calibration).shard(rank, size)
        check_fits(calibration, fingerprint, geometry, config.recipe)
        return calibration, f"from {config.calibration}"
    path = cache_path(fingerprint, config.recipe, rank, size)
    cached = load_cached(path, fingerprint, geometry, config.recipe)
    if cached is None and path.exists():
        logger.warning("kv-quant oscar: the calibration in %s cannot be used and is made again", path)
    if _on_all_ranks(cached is not None):
        return cached, f"cached in {path}"
    if tokenizer is None:
        raise CalibrationError(
            "--skip-tokenizer-init leaves no tokenizer to calibrate with; make a file with 'oscar-radix calibrate' and name it in "
            "--oscar-calibration"
        )
    calibration = replace(_calibrate(runner, tokenizer, config, geometry), model_name=folder.name, model_fingerprint=fingerprint)
    store_cached(path, calibration)
    return calibration, f"made from {calibration.tokens} tokens of the bundled text, cached in {path}"


def _on_all_ranks(here: bool) -> bool:
    """Whether every tensor-parallel rank says so: they calibrate together or not at all, since a layer's output is a sum over ranks."""
    group = get_parallel().attn_tp_group
    return all(group.all_gather_object(here)) if group.world_size > 1 else here


def _calibrate(runner: Any, tokenizer: Any, config: OscarConfig, geometry: Geometry) -> Calibration:
    text = builtin_text()
    tokens = tokenizer.encode(text)[:CALIBRATION_TOKENS]
    logger.info("kv-quant oscar: no calibration for this model yet; running %d tokens of the bundled text through it", len(tokens))
    backend = runner.attn_backend
    if not isinstance(backend, OscarAttentionBackend):
        raise RuntimeError(f"the model runner's attention backend is {type(backend).__name__}, not ours")
    backend.moments = MomentAccumulator(geometry)
    try:
        for sequence, place in placed_sequences(tokens, _context(runner)):
            _prefill(runner, backend, sequence, place)
        moments = backend.moments.finish()
    finally:
        backend.moments = None
    return replace(fit(get_recipe(config.recipe), moments), text_hash=text_fingerprint(text))


def _context(runner: Any) -> int:
    """Positions that the model has, or fewer where the user says so."""
    model = runner.model_config
    return min(model.context_len, getattr(model.hf_text_config, "max_position_embeddings", model.context_len))


def _model_folder(model_path: str) -> Path:
    """The model's local folder; for a hub id, the snapshot that SGLang has just loaded."""
    folder = Path(model_path)
    return folder if folder.is_dir() else Path(snapshot_download(model_path, local_files_only=True))


@torch.no_grad()
def _prefill(runner: Any, backend: OscarAttentionBackend, tokens: list[int], first_position: int) -> None:
    """One sequence through the model; nothing is cached (every slot is padding slot 0)."""
    device, count = runner.device, len(tokens)
    lengths = torch.tensor([count], dtype=torch.int64, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=torch.tensor(tokens, dtype=torch.int64, device=device),
        req_pool_indices=zero,
        seq_lens=lengths,
        out_cache_loc=torch.zeros(count, dtype=torch.int64, device=device),
        seq_lens_sum=count,
        seq_lens_cpu=lengths.cpu(),
        positions=first_position + torch.arange(count, dtype=torch.int64, device=device),
        extend_num_tokens=count,
        extend_seq_lens=lengths.to(torch.int32),
        extend_prefix_lens=zero.to(torch.int32),
        extend_start_loc=zero.to(torch.int32),
        extend_prefix_lens_cpu=[0],
        extend_seq_lens_cpu=[count],
        extend_logprob_start_lens_cpu=[count],
        capture_hidden_mode=CaptureHiddenMode.NULL,
        num_token_non_padded_cpu=count,
    )
    with forward_context(ForwardContext(attn_backend=backend)):
        runner.model.forward(batch.input_ids, batch.positions, batch)
