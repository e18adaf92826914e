"""Argument checks shared by all operations, made before torch's dispatcher, whose messages say what it misses and not what was given."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(**given: object) -> None:
    """Require dense tensors, given by the names of the arguments.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A tensor is sparse or has another layout that is not dense.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; give a tensor")
        if value.layout != torch.strided:
            raise ValueError(f"{name} is {value.layout}; give a dense tensor, as to_dense() makes it")


def of_type(name: str, value: object, *types: type) -> None:
    """Require an argument to be an instance of one of these classes.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, types):
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        raise TypeError(f"{name} is {type(value).__name__}; give {wanted}")
