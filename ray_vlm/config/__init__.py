"""The job file: its schema, reading it, and the rules across sections. Imports neither torch nor ray."""
