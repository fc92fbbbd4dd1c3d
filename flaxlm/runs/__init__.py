"""A run and its directory: from a config to a trained model, killed or not."""
