"""The model: sizes, transformer, rectified flow, latent codecs, text encoders, weights by name."""

from vchitect_fast.architecture import PRESETS, TransformerConfig, preset
from vchitect_fast.model.blocks import Branches
from vchitect_fast.model.transformer import VchitectTransformer

__all__ = ["PRESETS", "Branches", "TransformerConfig", "VchitectTransformer", "preset"]
