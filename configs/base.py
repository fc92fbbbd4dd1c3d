"""Every knob of flaxlm: see `flaxlm/config/base.py`, which this passes on."""

from flaxlm.config.base import get_config, source, sources

__all__ = ["get_config", "source", "sources"]
