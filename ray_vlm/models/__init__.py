"""Families, loading in 4 bit, adapters. Imports nothing heavy until a function is called; never imports ray."""
