"""Attention operations, one a file, each with its plain-torch specification. Knows neither SGLang nor the core."""
