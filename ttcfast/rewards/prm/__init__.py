"""Process reward model: networks that score candidates, the triplets they learn from, and their training."""

from .dense import DensePRM
from .model import PRM

__all__ = ["PRM", "DensePRM"]  # imported, so that files of both kinds can be loaded
