"""Serves a model over HTTP, as clients of OpenAI's API expect it."""
