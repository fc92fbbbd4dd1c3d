"""Reads and encodes labelled examples for fine-tuning, and scores predictions."""
