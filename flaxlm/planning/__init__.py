"""What a run needs and how fast it should be, before it is started."""
