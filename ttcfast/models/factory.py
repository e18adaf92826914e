"""Surrogates from a checkpoint of ours, or from a function of the user's own that is named as ``package.module:function``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ttcfast.core.base_fm import Surrogate
from ttcfast.core.seeds import temp_seed
from ttcfast.runtime.errors import ArgumentError, UserError
from ttcfast.runtime.files import strict

from .checkpoint import load_surrogate, surrogate_hash


def check_one_model(checkpoint: str | None, factory: str | None, args: Mapping[str, Any]) -> None:
    """Raise ``ArgumentError`` unless there is exactly one of a checkpoint and a factory, and arguments only with a factory."""
    if not checkpoint and not factory:
        raise ArgumentError(
            "fm.ckpt is not given, and no fm.factory either; add fm.ckpt=<file of ttcfast train_fm> or fm.factory=package.module:function"
        )
    if checkpoint and factory:
        raise ArgumentError(f"fm.ckpt is {checkpoint} and fm.factory is {factory}; give one of them")
    if args and not factory:
        raise ArgumentError(f"fm.args is {dict(args)} and fm.factory is null; they are the arguments of a factory: give one, or no fm.args")


def open_surrogate(
    checkpoint: str | None, factory: str | None = None, args: Mapping[str, Any] | None = None, *, device: str | torch.device = "cpu"
) -> Surrogate:
    """Return the surrogate of a checkpoint, or the one that a function returns.

    The function is called with the random streams seeded, so that weights it draws are the same in every process and every run. Its
    module is looked for in the working directory first.

    Args:
        checkpoint: File of ``ttcfast train_fm``; None with a factory.
        factory: ``"package.module:function"``.
        args: Keyword arguments of the function.
        device: Device to move the surrogate to.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of another architecture.
        ArgumentError: Not exactly one of both is given, the module or function is not there, the arguments do not fit it, or it returns
            something else than a ``Surrogate``.
        UserError: The module cannot be imported, or the function raised an error of its own.
    """
    given = dict(args or {})
    check_one_model(checkpoint, factory, given)
    if factory is None:
        assert checkpoint is not None
        return load_surrogate(checkpoint, device=device)
    function = _function(factory)
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise ArgumentError(
            f"fm.args is {given}, which does not fit {factory}{inspect.signature(function)}: {error}; set them as fm.args.<name>=<value>"
        ) from error
    except ValueError:  # a function without a signature, such as one in C
        pass
    try:
        with temp_seed(0):
            made = function(**given)
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"fm.factory {factory} raised {type(error).__name__}: {error}; --debug shows where") from error
    if not isinstance(made, Surrogate):
        raise ArgumentError(
            f"fm.factory {factory} returned a {type(made).__name__}; return ttcfast.core.base_fm.Surrogate(model, spec, ...)"
        )
    made.origin = {"factory": factory, "args": strict(given)}
    return made.to(device)


def name_of_model(checkpoint: str | None, factory: str | None) -> str:
    """Return what messages and notes call a model: its checkpoint's path or its factory."""
    return str(factory if checkpoint is None else checkpoint)


def provenance_of(surrogate: Surrogate) -> dict[str, Any]:
    """Return what a record says about a factory's model, under ``"model"``: factory, args, a hash of the weights, and the noise that it
    has where a run gives none; {} for checkpoints."""
    if surrogate.origin is None:
        return {}
    return {"model": {**surrogate.origin, "weights": surrogate_hash(surrogate), "stochastic": dataclasses.asdict(surrogate.stochastic)}}


def _function(name: str) -> Callable[..., Any]:
    module_name, colon, path = name.partition(":")
    parts = [*module_name.split("."), *path.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise ArgumentError(f"fm.factory is {name!r}; write package.module:function, with dots and no .py")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ArgumentError(
                f"fm.factory is {name}, and there is no module {error.name!r} in {here} or among the installed packages; start the command "
                "in the folder that holds it, or install it"
            ) from error
        raise UserError(f"fm.factory is {name}, and importing {module_name} failed: {error}; install what it needs") from error
    except Exception as error:
        raise UserError(f"fm.factory is {name}, and importing {module_name} raised {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            held = getattr(found, "__dict__", {}).items()
            known = [n for n, value in held if callable(value) and getattr(value, "__module__", None) == module_name]
            raise ArgumentError(f"fm.factory is {name}, and {module_name} has no {part!r}; it has {', '.join(known) or 'no functions'}")
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentError(f"fm.factory is {name}, which is a {type(found).__name__}; name a function that returns a Surrogate")
    function: Callable[..., Any] = found
    return function
