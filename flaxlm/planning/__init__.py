"""Whether a config fits some hardware, how fast it is there and what it costs."""
