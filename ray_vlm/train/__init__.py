"""The driver and the workers of a training run."""
