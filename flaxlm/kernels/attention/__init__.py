"""Attention: one definition, and the backends that compute it. No JAX here."""
