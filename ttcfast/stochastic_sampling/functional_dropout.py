"""Dropout that a model calls by function, which no module shows: found in the source of the model's classes."""

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

Given = float | tuple[str, ...]  # what a call is given: a number, or where the module has it: ("drop", "p") of self.drop.p


def functional_dropout(modules: Mapping[str, nn.Module]) -> dict[str, float | None]:
    """Names of the modules whose own code calls dropout by function where ``self.training`` is set, with the largest rate it may have.

    Seen are calls such as ``F.dropout(x, 0.1, self.training)`` and ``F.scaled_dot_product_attention(..., dropout_p=self.p if self.training
    else 0)`` in any method of the module's class, its own or inherited. A rate is told where it is a number or an attribute of the module;
    it is None where it is something else, and the module is left out where it is 0. Classes without source (TorchScript, C++) show nothing.

    Args:
        modules: those of a model, by name, as ``model.named_modules()`` lists them.
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


def _rate(module: nn.Module, call: tuple[Given, ...]) -> float | None:
    """The largest number in [0, 1) that a call is given; None where there is none."""
    return max((value for given in call if (value := _value(module, given)) is not None and 0 <= value < 1), default=None)


def _value(module: nn.Module, given: Given) -> float | None:
    value: Any = given
    if isinstance(given, tuple):
        value = module
        for part in given:
            value = getattr(value, part, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@lru_cache(maxsize=4096)
def _calls(kind: type) -> tuple[tuple[Given, ...], ...]:
    """The calls in a class's methods that read ``self.training`` and speak of dropout, each as the numbers that may be its rate."""
    trees = [tree for name in dict.fromkeys(name for c in _own(kind) for name in vars(c)) for tree in _sources(kind, name)]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call) and _drops(node)]
    return tuple(tuple(given for node in _arguments(call) if (given := _given_as(node)) is not None) for call in calls)


def _own(kind: type) -> list[type]:
    """A class and its bases but torch's, whose layers drop in modules, and Python's."""
    return [c for c in kind.__mro__ if c.__module__.partition(".")[0] not in ("torch", "builtins")]


def _sources(kind: type, method: str) -> Iterator[ast.AST]:
    """The code of a method, and of those of the bases that it may call by ``super()``."""
    for c in _own(kind):
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
    named = [ast.unparse(call.func), *(keyword.arg or "" for keyword in call.keywords)]
    if not any("drop" in name.lower() for name in named):
        return False
    return any(isinstance(node, ast.Attribute) and node.attr == "training" for argument in _passed(call) for node in ast.walk(argument))


def _passed(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _arguments(call: ast.Call) -> Iterator[ast.expr]:
    """What a call is given, a conditional counting as its two branches."""
    for node in _passed(call):
        yield from (node.body, node.orelse) if isinstance(node, ast.IfExp) else (node,)


def _given_as(node: ast.expr) -> Given | None:
    """A number, or the path of an attribute of ``self``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    first, *path = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else [""]
    return tuple(path) if first == "self" else None
