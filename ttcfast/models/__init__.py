"""The surrogates we train, and how they are kept on disk."""

from .checkpoint import load_surrogate, save_surrogate, surrogate_hash
from .vit import ViT, ViTConfig

__all__ = ["ViT", "ViTConfig", "load_surrogate", "save_surrogate", "surrogate_hash"]
