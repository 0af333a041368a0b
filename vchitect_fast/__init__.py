"""vchitect_fast: train Vchitect-2.0-like video diffusion transformers as fast as the hardware allows.

Importing the package loads neither torch nor anything slow: only the words that every part shares. Everything else is
imported from its own module, `vchitect_fast.model`, `vchitect_fast.autotune` and so on.
"""

from __future__ import annotations

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.errors import UserError
from vchitect_fast.plan import Plan
from vchitect_fast.shapes import VideoShape

__version__ = "0.1.0"
__all__ = ["Plan", "TransformerConfig", "UserError", "VideoShape", "__version__"]
