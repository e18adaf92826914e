"""Applies dropout whose mask depends only on (seed, step, site, problem, candidate, element)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttcfast.spec import Key

from . import define, keyed, native, transforms
from .arguments import dense


def keyed_dropout(
    x: Tensor,
    p: float,
    *,
    key: Key,
    rows: Tensor,
    antithetic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Set entries to 0 with probability p and divide the others by 1 - p.

    Args:
        x: ``[M, ...]``, float32, float64 or bfloat16, any strides; the elements of a row are numbered row-major.
        p: Probability of dropping an entry, in [0, 1); rounded to the nearest multiple of 2**-32.
        key: Key of the random stream; see :func:`normal`.
        rows: (problem, candidate) of each row, int64 ``[M, 2]``; see :func:`normal`.
        antithetic: Whether candidates 2, 4, 6, ... use the complemented bits of the candidate before them: at p = 1/2 they keep exactly
            the entries that it dropped.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``.

    Returns:
        Shape and dtype of x, contiguous. An entry is kept where its 32-bit draw is at least round(p 2**32), so masks are bitwise equal
        on every backend and for any split of the rows. A dropped entry is 0 even where x is not finite. Differentiable in x,
        any number of times and in forward mode; the backward pass draws the mask again, so it is never stored. ``torch.func`` and
        ``torch.vmap`` (deterministic, since rows determine the draws) evaluate its definition, with the same masks. Under
        ``torch.autocast`` x may also be float16.

    Raises:
        TypeError: ``key`` is not a :class:`ttcfast.spec.Key`.
        ValueError: ``rows`` is not int64 ``[M, 2]``, or ``p`` is outside [0, 1).
        BackendError: The requested backend cannot run; the message says why.

    Source: Srivastava et al. (2014), inverted; docs/design/decisions.md ("Keyed candidates", "Dropout that acts").
    """
    dense(x=x)
    stream, site = keyed.stream_and_site(key, rows)
    if not isinstance(p, (int, float)):
        raise ValueError(f"p is {p!r}; a dropout rate lies in [0, 1)")
    result: Tensor = define.invoke("keyed_dropout", x, rows, stream, site, p, antithetic, backend)
    return result


class Call(NamedTuple):
    x: Tensor  # [M, ...]
    rows: Tensor  # int64 [M, 2]
    stream: Tensor  # int64 [1]
    site: int
    p: float
    antithetic: bool

    @property
    def elements(self) -> int:
        return math.prod(self.x.shape[1:])

    @property
    def scale(self) -> float:
        """Return the factor of a kept entry."""
        return 1 / (1 - self.p)

    @property
    def threshold(self) -> int:
        """Return the smallest 32-bit draw that keeps an entry, 2**32 if none does."""
        return round(self.p * 2**32)

    def empty(self) -> Tensor:
        return torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)


def check(call: Call) -> None:
    x, rows = call.x, call.rows
    keyed.check_names(rows, call.stream, call.site, x)
    if x.ndim < 1 or x.shape[0] != rows.shape[0]:
        raise ValueError(f"x has shape {tuple(x.shape)} and rows {tuple(rows.shape)}; give one (problem, candidate) for each row of x")
    if not 0 <= call.p < 1:
        raise ValueError(f"p is {call.p}; a dropout rate lies in [0, 1)")
    keyed.check_draws(x.dtype, "x", call.elements)


def keyed_dropout_ref(call: Call) -> Tensor:
    """The definition, in torch; allocates int64 temporaries of the size of x."""
    draws = keyed.uniforms_ref(call.rows, call.stream, call.site, call.elements, call.antithetic)
    kept = (draws >= call.threshold).reshape(call.x.shape)
    wide = call.x if call.x.dtype == torch.float64 else call.x.float()
    return torch.where(kept, wide * call.scale, 0.0).to(call.x.dtype).contiguous()


def _keyed_dropout_cpu(call: Call, out: Tensor, rows: Tensor) -> None:
    x, sizes, strides = keyed.grid(call.x)
    native.module().keyed_dropout(
        native.code(x.dtype),
        out.data_ptr(),
        x.data_ptr(),
        [x.stride(0), *sizes, *strides],
        call.threshold,
        call.scale,
        *keyed.native_rows(rows, call.stream, call.site, call.antithetic, call.elements),
    )


def _keyed_dropout_triton(call: Call, out: Tensor, rows: Tensor) -> None:
    from ttcfast.kernels import keyed as kernels

    kernels.launch_keyed_dropout(
        out, *keyed.grid(call.x), call.threshold, call.scale, rows, call.stream, call.site, call.elements, call.antithetic
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, stream, *ctx.rest = inputs
    ctx.save_for_backward(rows, stream)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, stream = ctx.saved_tensors
    return (define.invoke("keyed_dropout", grad, rows, stream, *ctx.rest), *[None] * 6)


define.define_call(
    "keyed_dropout",
    Call,
    "Tensor",
    check=check,
    backends=keyed.backends("keyed_dropout", _keyed_dropout_cpu, _keyed_dropout_triton, keyed_dropout_ref),
    empty=Call.empty,
    definition=keyed_dropout_ref,
    backward=_backward,
    setup_context=_setup,
    policy=transforms.halves_as_floats,
)
