"""Forecast what fine-tuning will make a model forget, train so that it does not, and verify the forecast."""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
