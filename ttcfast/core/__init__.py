"""Surrogates as the search uses them, random seeds, normalisation."""

from .base_fm import BaseFM, Surrogate
from .normalizer import Normalizer
from .seeds import hash_seed, temp_seed

__all__ = ["BaseFM", "Surrogate", "Normalizer", "temp_seed", "hash_seed"]
