"""Attention: one definition, and the backends that compute it. Imports no JAX."""
