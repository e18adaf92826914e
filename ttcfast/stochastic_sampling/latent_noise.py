"""Gaussian noise on a latent, directly or on the output of a named module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ttcfast.spec import at_least

from .dropout_wrap import edit_output


@torch.no_grad()
def inject_latent_noise(latent: Tensor, sigma: float, *, generator: Generator | None = None) -> Tensor:
    """``latent + sigma * N(0, 1)``, drawn in the latent's dtype on its device; a new tensor, without gradient.

    Args:
        latent: any shape, floating point.
        sigma: standard deviation in the latent's units, at least 0.
        generator: source of randomness on the latent's device; None takes torch's own.

    Raises:
        ValueError: ``sigma`` is negative.

    Source: seeds/ttc-integration-plan.md section 3B.
    """
    at_least("sigma", sigma, 0)
    noise = torch.randn(latent.shape, dtype=latent.dtype, device=latent.device, generator=generator)
    return torch.add(latent, noise, alpha=sigma)


@contextmanager
def latent_noise(model: nn.Module, name: str, sigma: float) -> Iterator[nn.Module]:
    """Noise of standard deviation ``sigma`` on the output of module ``name`` for the length of a block.

    Raises:
        ValueError: the model has no module of that name, or it returns no tensor.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"the latent module is {name!r}, which {type(model).__name__} does not have; see model.named_modules()")

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return edit_output(output, lambda z: inject_latent_noise(z, sigma), f"module {name!r}")

    handle = modules[name].register_forward_hook(hook)
    try:
        yield model
    finally:
        handle.remove()
