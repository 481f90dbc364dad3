"""Trajectory stitching of diffusion models (T-Stitch, Pan et al. 2024, arXiv:2402.14167)."""

import lazy_loader

__version__ = "0.13.0"

# ``__init__.pyi`` lists the public names and where each one is.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
