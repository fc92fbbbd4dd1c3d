"""Labelled examples, for fine-tuning, and the scores of what is predicted."""
