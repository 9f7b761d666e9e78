"""What promotion by attention mass gains against its controls, offline: `python -m benchmarks.quality`."""
