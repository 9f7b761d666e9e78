"""Calibration: streaming moments of a model, fitted recipes, and their files."""
