"""Linear layers by oneDNN within a call of a model on a CPU, with the GELU behind them in the same pass.

torch multiplies float32 matrices by MKL, which uses no AVX-512 on processors of other makers: on an AMD EPYC (Zen 5) oneDNN is 2.2 times
faster, and 1.0 to 1.1 times with AVX2 alone. Results agree to rounding. On CPUs with instructions for it the same holds for the layers of
a copy in bfloat16 (``LowPrecision``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttcfast.ops.define import define

from .low_precision import narrow

_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # by which Inductor multiplies; not in every build of torch


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str) -> Tensor:
    product: Tensor = _product(x, weight, bias, "gelu" if gelu else "none", [], gelu)  # type: ignore[misc]
    return product


# An operation of our own, since Inductor takes torch's only with constant weights.
define(
    "onednn_linear(Tensor x, Tensor weight, Tensor? bias, str gelu) -> Tensor",
    _run,
    lambda x, weight, bias, gelu: x.new_empty(*x.shape[:-1], len(weight)),
    keys=("CPU",),
)


@contextmanager
def onednn_products(model: nn.Module, like: Tensor) -> Iterator[None]:
    """Replaces the forwards of a model's linear layers within a block of a turn, and of what holds a linear layer and its GELU.

    Layers of other classes or with a forward of their own, models that torch.compile has compiled, calls with gradients, float32 under
    autocast, other precisions and calls on other devices are as without it.

    Args:
        model: Any module.
        like: A tensor of the device and dtype on which it is called.
    """
    replaced: list[nn.Module] = []
    try:
        if _product is not None and like.device.type == "cpu" and like.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            modules = list(model.modules())
            compiled = any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in modules)
            for module in [] if compiled else modules:
                own = _FORWARDS.get(type(module))
                if own is not None and "forward" not in vars(module):
                    vars(module)["forward"] = partial(own, module, threading.get_ident())
                    replaced.append(module)
        yield
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


def _linear(module: nn.Linear, thread: int, input: Tensor, gelu: str | None = None) -> Tensor:
    """The layer's output; with ``gelu``, its GELU in that approximation. Other threads than ``thread`` get torch's own."""
    x, weight = input, module.weight
    plain = type(x) is Tensor and x.ndim > 1 and x.dtype == weight.dtype and x.device.type == weight.device.type == "cpu"
    plain = plain and bool(x.numel()) and weight.is_contiguous() and threading.get_ident() == thread
    if plain and x.dtype == torch.bfloat16:
        plain = _bfloat16()
    elif plain:
        plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not plain or torch.is_grad_enabled():
        out = F.linear(x, weight, module.bias)
        return out if gelu is None else F.gelu(out, approximate=gelu)
    product: Tensor = torch.ops.ttcfast.onednn_linear(x, weight, module.bias, gelu or "")
    return product


@cache
def _bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _sequence(sequence: nn.Sequential, thread: int, input: object) -> object:
    x, layers = input, list(sequence)
    while layers:
        module = layers.pop(0)
        if layers and isinstance(x, Tensor) and _follows(module, layers[0]):
            x, *_ = narrow(module, (x,)) if module._forward_pre_hooks else (x,)
            x = _linear(module, thread, x, layers.pop(0).approximate)  # type: ignore[arg-type]
        else:
            x = module(x)
    return x


def _follows(module: nn.Module, after: nn.Module) -> bool:
    """Tell whether these are a linear layer and a GELU between which nobody else looks."""
    if type(module) is not nn.Linear or type(after) is not nn.GELU or "forward" in vars(after):
        return False
    own = vars(module).get("forward")
    hooks = (module._forward_hooks, after._forward_hooks, after._forward_pre_hooks)
    foreign = any(hooks) or any(hook is not narrow for hook in module._forward_pre_hooks.values())
    return isinstance(own, partial) and own.func is _linear and not foreign


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {nn.Linear: _linear, nn.Sequential: _sequence}
