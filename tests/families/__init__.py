"""Tiny models of each family."""
