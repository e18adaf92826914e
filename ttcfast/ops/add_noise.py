"""Writes B noisy copies of each state in one pass, each with its own keyed normals."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttcfast.spec import Key

from . import define, keyed, native, transforms
from .arguments import dense


def add_noise(
    x: Tensor,
    B: int,
    sigma: float,
    *,
    key: Key,
    rows: Tensor,
    antithetic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return ``x + sigma * normal`` for B candidates of each problem.

    Args:
        x: States, ``[N, C, *S]`` with any number of axes after N, float32, float64 or bfloat16, any strides.
        B: Candidates per problem.
        sigma: Standard deviation of the noise, in the units of x; 0 or more.
        key: Key of the random stream; see :func:`normal`.
        rows: (problem, candidate) of each result, int64 ``[N B, 2]``, problem-major: row n B + b belongs to ``[n, b]``.
        antithetic: Whether candidates 2, 4, 6, ... take the negated noise of the candidate before them.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``.

    Returns:
        ``[N, B, C, *S]``, contiguous, dtype of x. Computed in float32 (float64 for float64 x) and rounded once to that dtype. The noise
        is that of ``normal`` with the same key and rows, elements numbered row-major in ``[C, *S]``. Differentiable in x, any number of
        times and in forward mode. ``torch.func`` and ``torch.vmap`` (deterministic, since rows determine the draws) evaluate its
        definition, whose normals differ by rounding. Under ``torch.autocast`` x may also be float16. NaN and infinities propagate.
        Writes the result once; the copies of x and the noise are never stored.

    Raises:
        TypeError: ``key`` is not a :class:`ttcfast.spec.Key`.
        ValueError: ``rows`` is not int64 ``[N B, 2]``, B is below 1, or ``sigma`` is negative, not finite, or a tensor that
            requires a gradient.
        BackendError: The requested backend cannot run; the message says why.

    Source: docs/design/decisions.md ("Keyed candidates").
    """
    dense(x=x)
    stream, site = keyed.stream_and_site(key, rows)
    transforms.constant("sigma", sigma)
    result: Tensor = define.invoke("add_noise", x, rows, stream, site, B, sigma, antithetic, backend)
    return result


class Call(NamedTuple):
    x: Tensor  # [N, C, *S]
    rows: Tensor  # int64 [N B, 2]
    stream: Tensor  # int64 [1]
    site: int
    B: int
    sigma: float
    antithetic: bool

    @property
    def elements(self) -> int:
        return math.prod(self.x.shape[1:])

    def empty(self) -> Tensor:
        return torch.empty((self.x.shape[0], self.B, *self.x.shape[1:]), dtype=self.x.dtype, device=self.x.device)


def check(call: Call) -> None:
    x, rows = call.x, call.rows
    keyed.check_names(rows, call.stream, call.site, x)
    if x.ndim < 1:
        raise ValueError("x has no axes; give [N, C, *S]")
    if call.B < 1:
        raise ValueError(f"B is {call.B}; give at least one candidate per problem")
    if rows.shape[0] != x.shape[0] * call.B:
        raise ValueError(f"rows have shape {tuple(rows.shape)}; N = {x.shape[0]} problems of B = {call.B} need [{x.shape[0] * call.B}, 2]")
    if not 0 <= call.sigma < math.inf:
        raise ValueError(f"sigma is {call.sigma}; a standard deviation is finite and not negative")
    keyed.check_draws(x.dtype, "x", call.elements)


def add_noise_ref(call: Call) -> Tensor:
    """The definition, in torch: computed in float64, where the product of two float32 numbers is exact, and rounded to float32 last."""
    x, wide = call.x, call.x.dtype == torch.float64
    sigma = call.sigma if wide else torch.tensor(call.sigma, dtype=torch.float32).item()
    draws = keyed.normals_ref(call.rows, call.stream, call.site, call.elements, call.antithetic)
    noise = (sigma * draws.double()).reshape(x.shape[0], call.B, *x.shape[1:])
    noisy = x.unsqueeze(1).double() + noise
    return noisy if wide else noisy.float().to(x.dtype)


def _add_noise_cpu(call: Call, out: Tensor, rows: Tensor) -> None:
    x, sizes, strides = keyed.grid(call.x)
    native.module().add_noise(
        native.code(x.dtype),
        out.data_ptr(),
        x.data_ptr(),
        [x.stride(0), *sizes, *strides],
        call.B,
        call.sigma,
        *keyed.native_rows(rows, call.stream, call.site, call.antithetic, call.elements),
    )


def _add_noise_triton(call: Call, out: Tensor, rows: Tensor) -> None:
    from ttcfast.kernels import keyed as kernels

    kernels.launch_add_noise(out, *keyed.grid(call.x), call.B, call.sigma, rows, call.stream, call.site, call.elements, call.antithetic)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad.sum(1), *[None] * 7)


define.define_call(
    "add_noise",
    Call,
    "Tensor",
    check=check,
    backends=keyed.backends("add_noise", _add_noise_cpu, _add_noise_triton, add_noise_ref),
    empty=Call.empty,
    definition=add_noise_ref,
    backward=_backward,
    policy=transforms.halves_as_floats,
)
