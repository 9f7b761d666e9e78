"""The only code that touches SGLang: entry point, flags, refusals, and adapters for pool, allocator, attention and tree."""
