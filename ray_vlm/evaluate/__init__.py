"""Measure a model by generating: predict, score with the task's own functions, sum up, show."""
