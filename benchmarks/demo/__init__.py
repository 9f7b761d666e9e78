"""The demo: multi-turn agents against stock bf16 and against the 2-bit cache, with the same bytes for the KV cache."""
