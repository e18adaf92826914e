"""Dropout that a model calls by function, which no module shows: found in the source of the model's classes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import nn

from .dropout_wrap import is_dropout


def functional_dropout(model: nn.Module) -> dict[str, float | None]:
    """Names of the modules whose own code calls dropout by function where ``self.training`` is set, with the largest rate it may have.

    Seen are calls such as ``F.dropout(x, 0.1, self.training)`` and ``F.scaled_dot_product_attention(..., dropout_p=self.p if self.training
    else 0)`` in any method of the module's class. A rate is told where it is a number or an attribute of the module; it is None where it
    is something else, and the module is left out where it is 0. Classes without source (TorchScript, C++) show nothing. The model itself is
    named ``""``.
    """
    found: dict[str, float | None] = {}
    for name, module in model.named_modules():
        rates = [] if is_dropout(module) else [rate_in(module, call) for call in _calls(type(module))]  # type: ignore[arg-type]
        rates = [rate for rate in rates if rate != 0]
        if rates:
            found[name] = None if None in rates else max(rate for rate in rates if rate is not None)
    return found


def rate_in(module: nn.Module, call: ast.Call) -> float | None:
    """The largest number in [0, 1) among a call's arguments, attributes of the module looked up; None where there is none."""
    values = [value for node in _arguments(call) if (value := _value(module, node)) is not None and 0 <= value < 1]
    return max(values, default=None)


@lru_cache(maxsize=4096)
def _calls(kind: type) -> tuple[ast.Call, ...]:
    """The calls in a class's source that read ``self.training`` and speak of dropout."""
    if kind.__module__.startswith("torch."):  # what torch's own layers drop is in modules
        return ()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.Call) and _drops(node))


def _drops(call: ast.Call) -> bool:
    named = [ast.unparse(call.func), *(keyword.arg or "" for keyword in call.keywords)]
    if not any("drop" in name.lower() for name in named):
        return False
    return any(isinstance(node, ast.Attribute) and node.attr == "training" for argument in _given(call) for node in ast.walk(argument))


def _given(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _arguments(call: ast.Call) -> Iterator[ast.expr]:
    """What a call is given, a conditional counting as its two branches."""
    for node in _given(call):
        yield from (node.body, node.orelse) if isinstance(node, ast.IfExp) else (node,)


def _value(module: nn.Module, node: ast.expr) -> float | None:
    """Of a number, or of an attribute of ``self`` that is one."""
    value: Any = None
    if isinstance(node, ast.Constant):
        value = node.value
    elif isinstance(node, ast.Attribute):
        path = ast.unparse(node).split(".")
        if path[0] == "self":
            value = module
            for part in path[1:]:
                value = getattr(value, part, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
