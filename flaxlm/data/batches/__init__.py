"""Rows and their order: pure functions of the seed and the step."""
