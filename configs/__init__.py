"""Run configurations: base.py lists every knob, the others are base plus their differences."""
