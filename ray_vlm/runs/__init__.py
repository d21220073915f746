"""Run folders: where they are, what they say of themselves, the numbers in them. Imports nothing heavy."""
