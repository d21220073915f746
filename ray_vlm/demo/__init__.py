"""The demo: scenes to draw, a tiny model that learns from them, and the story that shows it."""
