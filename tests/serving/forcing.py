"""A logit processor that decodes given tokens one by one, and writes down what the model would have predicted at each."""

from pathlib import Path

import numpy as np
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from benchmarks.servers import SglangServer


class ForcedTokens(CustomLogitProcessor):
    """Runs in the scheduler process, which unpickles it by name from this module.

    Custom parameters of a request: `ids` to decode; `file` that takes float32 log-probabilities, one step after the other;
    `whole` for the whole vocabulary at each step, else the forced token's alone.
    """

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict] | None = None) -> torch.Tensor:
        log_p = torch.log_softmax(logits.float(), dim=-1)
        # Other tensor-parallel ranks may come here when the first one has answered and the file is gone.
        writes = torch.distributed.get_rank() == 0
        for row, params in enumerate(custom_param_list):
            request = params["__req__"]
            # Not its output_ids: under overlap scheduling they lack the token of the step before.
            step = max(0, request.kv_committed_len - len(request.origin_input_ids))
            if step >= len(params["ids"]):
                continue  # under overlap scheduling a request that has ended runs once more
            forced = params["ids"][step]
            kept = (log_p[row] if params["whole"] else log_p[row, forced : forced + 1]).cpu().numpy().tobytes()
            # SGLang samples after every chunk of a prompt; only the last of a step's rows counts.
            if writes:
                with Path(params["file"]).open("r+b") as file:
                    file.seek(step * len(kept))
                    file.write(kept)
            logits[row] = -torch.inf
            logits[row, forced] = 0.0
        return logits


def decode_forced(server: SglangServer, prompt: list[int], forced: list[int], file: Path, whole: bool = False) -> tuple[dict, np.ndarray]:
    """Generate exactly `forced` after `prompt`.

    Args:
        server: started with --enable-custom-logit-processor.
        file: scratch file; must not exist.

    Returns:
        `meta_info` of the answer, and natural log-probabilities before forcing: float32 [len(forced), vocabulary] if `whole`,
        else [len(forced)].
    """
    file.touch(exist_ok=False)
    custom = {"ids": forced, "file": str(file), "whole": whole}
    sampling = {"max_new_tokens": len(forced), "temperature": 0.0, "ignore_eos": True, "custom_params": custom}
    answer = server.generate(prompt, len(forced), sampling_params=sampling, custom_logit_processor=PROCESSOR)
    if answer["output_ids"] != forced:
        raise AssertionError(f"asked for {forced[:8]}..., the server decoded {answer['output_ids'][:8]}...")
    values = np.fromfile(file, dtype=np.float32)
    file.unlink()
    return answer["meta_info"], values.reshape(len(forced), -1) if whole else values


PROCESSOR = ForcedTokens.to_str()
if ForcedTokens.__module__ != "tests.serving.forcing":
    raise ImportError(f"{__name__} must be tests.serving.forcing, which the scheduler imports: run pytest at the root")
