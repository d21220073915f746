"""The job file: its schema, reading it, and the rules that span sections. Imports no torch and no ray."""
