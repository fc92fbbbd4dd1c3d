"""Run configurations: base.py lists every knob, the others say what they change."""
