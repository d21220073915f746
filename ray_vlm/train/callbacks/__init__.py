"""What happens beside a trainer's steps, one class a concern. `train/run_callbacks.py` puts them in order."""
