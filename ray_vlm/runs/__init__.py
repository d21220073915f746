"""Run folders: their paths, manifests, checkpoints and metrics. Imports nothing heavy."""
