"""Gaussian noise on a latent, directly or on the output of a named module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Generator, Tensor, nn

from ttcfast.checks import at_least
from ttcfast.runtime.turns import turn
from ttcfast.spec import Key

from .dropout_wrap import edit_output
from .input_perturb import perturb_state


def inject_latent_noise(
    latent: Tensor,
    sigma: float,
    *,
    generator: Generator | None = None,
    key: Key | None = None,
    rows: Tensor | None = None,
    antithetic: bool = False,
) -> Tensor:
    """Returns ``latent + sigma * N(0, 1)``: a new, detached tensor.

    Args:
        latent: Floating-point or complex tensor of any shape.
        sigma: Standard deviation in the units of the latent, non-negative.
        generator, key, rows, antithetic: See ``perturb_state``.

    Raises:
        TypeError: ``key`` is not a ``Key``.
        ValueError: ``sigma`` is negative; otherwise as in ``perturb_state``.

    Source: TTC plan, "Stochasticity at Test Time".
    """
    at_least("sigma", sigma, 0)
    return perturb_state(latent, sigma, generator=generator, key=key, rows=rows, antithetic=antithetic)


@contextmanager
def latent_noise(model: nn.Module, name: str, sigma: float) -> Iterator[nn.Module]:
    """Adds noise of standard deviation ``sigma`` to the output of module ``name`` within the block, drawn from the global streams.

    ``keyed_noise`` draws it by key. Threads take turns (``ttcfast.runtime.turns``).

    Raises:
        ValueError: The model has no such module, or the module returns no tensor.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"the latent module is {name!r}, which {type(model).__name__} does not have; see model.named_modules()")

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return edit_output(output, lambda z: inject_latent_noise(z, sigma), f"module {name!r}")

    with turn("latent_noise") as this, modules[name].register_forward_hook(hook), this.body():
        yield model
