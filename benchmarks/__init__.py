"""Benchmarks that compare this package with its stock peers in one run: `python -m benchmarks.NAME [--quick] [--json
PATH]`."""
