"""From source rows to batches: records, index, plan, stream."""
