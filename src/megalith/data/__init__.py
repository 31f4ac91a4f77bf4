"""From bytes on disk to batches."""
