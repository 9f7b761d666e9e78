"""The only code that touches SGLang: entry point, flags, and one adapter for each part of SGLang that is replaced."""
