"""Quality after a prefix hit is quality without one."""

import numpy as np

from tests.serving import quality

ALLOWED_RATIO = 1.10


def test_kl_after_a_hit_is_that_of_a_computed_prefix(stock, running, logs):
    """Mean KL to bf16 of 64 decoded tokens, over eight prefixes; policy `none`, so that both sides read the same precision by design."""
    after_hit, computed = [], []
    for part, expected in zip(quality.parts(), stock.predictions, strict=True):
        prefix = part[0][:-1]
        running.flush_cache()
        hit_tokens, log_p = quality.predictions(running, part, logs)
        assert hit_tokens == 0
        computed.append(quality.kl(expected, log_p).mean())
        running.flush_cache()
        running.generate(prefix, 1)
        hit_tokens, log_p = quality.predictions(running, part, logs)
        assert hit_tokens == len(prefix)
        after_hit.append(quality.kl(expected, log_p).mean())
    difference = np.array(after_hit) - np.array(computed)
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    ratio = np.mean(after_hit) / np.mean(computed)
    print(f"KL computed {np.mean(computed):.5f}, after a hit {np.mean(after_hit):.5f}: ratio {ratio:.3f}")
    print(f"difference {difference.mean():+.5f}, standard error {error:.5f}; per prefix {np.round(difference, 5)}")
    assert ratio <= ALLOWED_RATIO
