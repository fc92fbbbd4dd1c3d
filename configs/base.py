"""Every knob of flaxlm: re-exports `flaxlm/config/base.py`."""

from flaxlm.config.base import get_config, source, sources

__all__ = ["get_config", "source", "sources"]
