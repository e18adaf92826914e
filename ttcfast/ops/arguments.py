"""Argument checks shared by all operations, made before torch's dispatcher, whose messages do not show the offending value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dense(**given: object) -> None:
    """Require dense tensors, given by argument name.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A tensor has a sparse or other non-dense layout.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; give a tensor")
        if value.layout != torch.strided:
            raise ValueError(f"{name} is {value.layout}; give a dense tensor, as to_dense() makes it")


def of_type(name: str, value: object, *types: type) -> None:
    """Require an argument to be an instance of one of these classes.

    Raises:
        TypeError: It is an instance of none of them.
    """
    if not isinstance(value, types):
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        raise TypeError(f"{name} is {type(value).__name__}; give {wanted}")


def lists(name: str, record: Any, kind: type[Any]) -> None:
    """Require ``record`` to be a named tuple of this class, whose fields are lists or tuples.

    Raises:
        TypeError: It is none, or a field is not.
    """
    of_type(name, record, kind)
    for field, part in zip(kind._fields, record):
        of_type(field, part, list, tuple)


def dense_parts(record: Any) -> None:
    """Require the fields of a named tuple to hold dense tensors.

    Raises:
        TypeError: An entry is not a tensor.
        ValueError: A tensor has a sparse or other non-dense layout.
    """
    for field, part in zip(record._fields, record):
        for i, t in enumerate(part):
            dense(**{f"{field}[{i}]": t})
