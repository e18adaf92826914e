"""Checks of arguments that all operations share, made before torch's dispatcher, which would say what it misses and not what was given."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(**given: object) -> None:
    """Every argument, by its name, is a dense tensor.

    Raises:
        TypeError: one is no tensor.
        ValueError: one is sparse or of another layout than a dense tensor's.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; give a tensor")
        if value.layout != torch.strided:
            raise ValueError(f"{name} is {value.layout}; give a dense tensor, as to_dense() makes it")


def of_type(name: str, value: object, *types: type) -> None:
    """The argument is an instance of one of these classes.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, types):
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        raise TypeError(f"{name} is {type(value).__name__}; give {wanted}")
