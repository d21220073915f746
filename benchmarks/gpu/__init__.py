"""Measurements of this package on one NVIDIA card, beside stock TRL on the same rows: `python -m benchmarks.gpu`."""
