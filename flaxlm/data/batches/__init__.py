"""Makes batches of rows: pure functions of the seed and the step."""
