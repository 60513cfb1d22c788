"""From recordings to batches: alignment, preparing, the prepared dataset, loading."""
