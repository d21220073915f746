"""Seeded mutations of everything that a user may hand to the package, and what each of them must not come to."""
