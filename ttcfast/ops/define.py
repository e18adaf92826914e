"""Defines operations as ``torch.ops.ttcfast.<name>``: schema, implementation, and fake results for tracing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from . import transforms
from .registry import Backend, choose

_library: Any = torch.library  # has no annotations
LIBRARY = _library.Library("ttcfast", "FRAGMENT")

_runs: dict[str, tuple[Callable[..., Any], transforms.Kinds]] = {}

TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    bool: "bool",
    str: "str",
    list[float]: "float[]",
    list[Tensor]: "Tensor[]",
    torch.dtype: "ScalarType",
}


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any], keys: Sequence[str] = ("CPU", "CUDA")) -> None:
    """Define an operation.

    Args:
        schema: Name, with ``.overload`` if it has several, arguments and results, in the syntax of ``torch.library``.
        run: Implementation, called with the arguments.
        fake: Called with the arguments when their tensors hold no data; returns tensors like those of ``run``.
        keys: Dispatch keys of ``run``.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    _runs[name] = run, transforms.Kinds(schema)
    for key in keys:
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"ttcfast::{name}", fake, lib=LIBRARY)


def invoke(name: str, *args: Any) -> Any:
    """Call ``torch.ops.ttcfast.<name>``, past torch's dispatcher where that has nothing to add: small cases cost less than its detours."""
    run, kinds = _runs[name]
    if transforms.plain(args, kinds):
        return run(*args)
    op, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.ttcfast, op), overload or "default")(*args)


def arguments(call: type[Any], whole: str = "SymInt") -> str:
    """Return the fields of a record as arguments of a schema; ``whole`` is the schema type of integers."""
    types: dict[Any, str] = {**TYPES, int: whole, list[int]: f"{whole}[]"}
    return ", ".join(f"{types[hint]} {field}" for field, hint in get_type_hints(call).items())


def define_call(
    name: str,
    call: type[Any],
    returns: str,
    *,
    check: Callable[[Any], None],
    backends: Sequence[Backend],
    empty: Callable[[Any], Any],
    definition: Callable[[Any], Any],
    whole: str = "SymInt",
    **autograd: Any,
) -> Callable[..., Any]:
    """Define an operation whose arguments are the fields of a record, in order, followed by the backend.

    Args:
        name: Name of the operation.
        call: Class of the record, a NamedTuple. ``check``, ``empty``, ``definition`` and the backends are called with an instance.
        returns: Results, in schema syntax.
        check: Raises ``ValueError`` for inconsistent arguments.
        backends: Implementations, in order of preference.
        empty: Allocates the results.
        definition: Computes the results in torch's own functions.
        whole: Schema type of integers: ``SymInt``, or ``int`` if each value should have a graph of its own.
        autograd: ``backward``, ``setup_context`` and ``policy`` of :func:`transforms.register`.

    Returns:
        The implementation, for calls that :func:`transforms.immediate` lets past torch's dispatcher.
    """

    def checked(*args: Any) -> Any:
        given = call(*args)
        check(given)
        return given

    def run(*args: Any) -> Any:
        given = checked(*args[:-1])
        return choose(name, backends, args[-1], given).run(given)

    define(f"{name}({arguments(call, whole)}, str backend) -> {returns}", run, lambda *args: empty(checked(*args[:-1])))
    transforms.register(LIBRARY, name, lambda *args: definition(checked(*args)), **autograd)
    return run
