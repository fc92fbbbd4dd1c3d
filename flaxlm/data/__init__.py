"""Text to token store to batches, and labelled examples to batches."""
