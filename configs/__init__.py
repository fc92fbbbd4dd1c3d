"""Run configurations: base.py has every knob; each other file lists its changes."""
