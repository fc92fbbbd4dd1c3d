"""Scores models on tasks: packed log-likelihoods, task files, the lm-eval adapter."""
