"""Side by side with the stock peers, in one run. `python -m benchmarks.NAME [--quick] [--json PATH]`."""
