"""Gaussian noise on a latent, directly or on the output of a named module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ttcfast.checks import at_least
from ttcfast.runtime.turns import turn
from ttcfast.spec import Key

from .dropout_wrap import edit_output
from .gaussian import add_gaussian


@torch.no_grad()
def inject_latent_noise(
    latent: Tensor,
    sigma: float,
    *,
    generator: Generator | None = None,
    key: Key | None = None,
    rows: Tensor | None = None,
    antithetic: bool = False,
) -> Tensor:
    """``latent + sigma * N(0, 1)``, drawn in the latent's dtype on its device; a new tensor, without gradient.

    Args:
        latent: any shape, floating point.
        sigma: standard deviation in the latent's units, at least 0.
        generator: source of randomness on the latent's device; None takes torch's own.
        key, rows, antithetic: noise that depends on (seed, step, site) and on the (problem, candidate) of each entry of the first axis
            alone, as in ``ttcfast.ops.add_noise``; ``rows`` of None counts candidates from 0 in problem 0.

    Raises:
        TypeError: ``key`` is not a ``Key``.
        ValueError: ``sigma`` is negative, a generator beside a key, rows without a key, or rows that do not fit.

    Source: seeds/ttc-integration-plan.md section 3B.
    """
    at_least("sigma", sigma, 0)
    return add_gaussian(latent, sigma, generator, key, rows, antithetic)


@contextmanager
def latent_noise(model: nn.Module, name: str, sigma: float) -> Iterator[nn.Module]:
    """Noise of standard deviation ``sigma`` on the output of module ``name`` for the length of a block, drawn in sequence from the
    global streams; ``keyed_noise`` draws it by key. Threads take turns (``ttcfast.runtime.turns``).

    Raises:
        ValueError: the model has no module of that name, or it returns no tensor.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"the latent module is {name!r}, which {type(model).__name__} does not have; see model.named_modules()")

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return edit_output(output, lambda z: inject_latent_noise(z, sigma), f"module {name!r}")

    with turn("latent_noise") as this:
        handle = modules[name].register_forward_hook(hook)
        try:
            with this.body():
                yield model
        finally:
            handle.remove()
