"""Tests; folders mirror the rooms of the package."""
