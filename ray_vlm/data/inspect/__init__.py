"""`ray-vlm data check | stats | preview`: look at a job's rows before training."""
