"""How the hot spots are computed. Plain functions of arrays; no model, no config."""
