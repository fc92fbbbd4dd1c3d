"""Every knob, how configs are loaded, and the rules they must satisfy. No JAX."""
