"""Finds dropout that a model calls as a function, which no module reveals, in the source of the model's classes."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from .dropout_wrap import is_dropout

Argument = float | tuple[str, ...]  # of a call: a number, or the path of an attribute, ("drop", "p") for self.drop.p


def functional_dropout(modules: Mapping[str, nn.Module]) -> dict[str, float | None]:
    """Finds modules whose own code calls dropout as a function if ``self.training`` is set, with the largest rate it may have.

    It detects calls such as ``F.dropout(x, 0.1, self.training)`` and ``F.scaled_dot_product_attention(..., dropout_p=self.p if
    self.training else 0)`` in any method of the module's class or its bases. Classes without source (TorchScript, C++) reveal nothing.

    Args:
        modules: Modules of a model by name, as in ``model.named_modules()``.

    Returns:
        The rate by module name; None if it is neither a number nor an attribute of the module. Modules with rate 0 are omitted.
    """
    found: dict[str, float | None] = {}
    for name, module in modules.items():
        calls = _calls(type(module))  # type: ignore[arg-type]
        if not calls or is_dropout(module):
            continue
        rates = [rate for call in calls if (rate := _rate(module, call)) != 0]
        if rates:
            found[name] = None if None in rates else max(rate for rate in rates if rate is not None)
    return found


def _rate(module: nn.Module, call: tuple[Argument, ...]) -> float | None:
    """Returns the largest argument of a call in [0, 1); None if there is none."""
    return max((value for given in call if (value := _value(module, given)) is not None and 0 <= value < 1), default=None)


def _value(module: nn.Module, given: Argument) -> float | None:
    value: Any = given
    if isinstance(given, tuple):
        value = module
        for part in given:
            value = getattr(value, part, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@lru_cache(maxsize=4096)
def _calls(kind: type) -> tuple[tuple[Argument, ...], ...]:
    """Returns the dropout calls that read ``self.training`` in a class's methods, each as the arguments that may be its rate."""
    trees = [tree for name in dict.fromkeys(name for c in _user_classes(kind) for name in vars(c)) for tree in _sources(kind, name)]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call) and _drops(node)]
    return tuple(tuple(given for node in _arguments(call) if (given := _as_argument(node)) is not None) for call in calls)


def _user_classes(kind: type) -> list[type]:
    """Returns a class and its bases without Python's and torch's, whose dropout is in modules."""
    return [c for c in kind.__mro__ if c.__module__.partition(".")[0] not in ("torch", "builtins")]


def _sources(kind: type, method: str) -> Iterator[ast.AST]:
    """Yields the syntax trees of a method and of the base methods that it may call by ``super()``."""
    for c in _user_classes(kind):
        found = vars(c).get(method)
        if found is None:
            continue
        function = getattr(found, "__func__", found)
        if not isinstance(function, types.FunctionType):
            return
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, TypeError, SyntaxError):
            return
        yield tree
        if not any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(tree)):
            return


def _drops(call: ast.Call) -> bool:
    """Returns whether a call names dropout and reads ``.training``."""
    named = [ast.unparse(call.func), *(keyword.arg or "" for keyword in call.keywords)]
    if not any("drop" in name.lower() for name in named):
        return False
    return any(isinstance(node, ast.Attribute) and node.attr == "training" for argument in _passed(call) for node in ast.walk(argument))


def _passed(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _arguments(call: ast.Call) -> Iterator[ast.expr]:
    """Yields the arguments of a call; a conditional yields both branches."""
    for node in _passed(call):
        yield from (node.body, node.orelse) if isinstance(node, ast.IfExp) else (node,)


def _as_argument(node: ast.expr) -> Argument | None:
    """Returns a number, or the path of an attribute of ``self``; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    first, *path = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else [""]
    return tuple(path) if first == "self" else None
