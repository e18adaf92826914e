"""Draws standard normals that depend only on (seed, step, site, problem, candidate, element)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ttcfast.spec import Key

from . import define, keyed, native
from .arguments import of_type


def normal(
    M: int,
    shape: Sequence[int],
    *,
    key: Key,
    rows: Tensor,
    dtype: torch.dtype = torch.float32,
    antithetic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Draw one row of standard normals for each (problem, candidate).

    Args:
        M: Number of rows.
        shape: Shape of one row. Its elements are numbered row-major, and an element's number determines its draw.
        key: Key of the random stream. Keys that differ in seed, step or site give independent numbers.
        rows: (problem, candidate) of each row, int64 ``[M, 2]``, both 0 or more, problems below 2**32. Negative numbers raise if the
            rows are in host memory; on a GPU they are not checked, since the host would have to wait.
        dtype: Float32, float64 or bfloat16: the float32 draw, widened or rounded.
        antithetic: Whether candidates 2, 4, 6, ... take the negated draw of the candidate before them.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``.

    Returns:
        ``[M, *shape]`` on the device of ``rows``. All backends use identical integers, and their normals agree within 8 units in the
        last place of float32. On one backend a row is bitwise independent of the other rows. Magnitudes lie in 2e-14 to 6.77.
        Not differentiable. ``torch.vmap`` over rows (deterministic, since they determine the draws) evaluates its definition.
        ``torch.autocast`` has no effect.

    Raises:
        TypeError: ``key`` is not a :class:`ttcfast.spec.Key`, or M is not an integer.
        ValueError: ``rows`` is not int64 ``[M, 2]`` or holds negative numbers, or ``dtype`` is not one of the three.
        BackendError: The requested backend cannot run; the message says why.

    Source: Philox 4x32-10 (Salmon et al. 2011), all four outputs used; Box and Muller (1958);
    docs/design/decisions.md ("Keyed candidates").
    """
    of_type("shape", shape, Sequence)
    if not isinstance(M, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"M is {M!r}; give the whole number of rows")
    stream, site = keyed.stream_and_site(key, rows)
    if isinstance(M, Tensor) or (rows.ndim == 2 and rows.shape[0] != M):
        raise ValueError(f"M is {M} and rows have shape {tuple(rows.shape)}; give M rows")
    return define.invoke("normal", rows, stream, site, list(shape), dtype, antithetic, backend)


class Call(NamedTuple):
    rows: Tensor  # int64 [M, 2]
    stream: Tensor  # int64 [1]
    site: int
    shape: list[int]
    dtype: torch.dtype
    antithetic: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def empty(self) -> Tensor:
        return torch.empty((self.rows.shape[0], *self.shape), dtype=self.dtype, device=self.rows.device)


def check(call: Call) -> None:
    keyed.check_names(call.rows, call.stream, call.site)
    if any(size < 0 for size in call.shape):
        raise ValueError(f"shape is {tuple(call.shape)}; sizes are 0 or more")
    keyed.check_draws(call.dtype, "dtype", call.elements)


def normal_ref(call: Call) -> Tensor:
    """The definition, in torch; allocates int64 temporaries of the result's size."""
    draws = keyed.normals_ref(call.rows, call.stream, call.site, call.elements, call.antithetic)
    return draws.to(call.dtype).reshape(call.rows.shape[0], *call.shape)


def _normal_cpu(call: Call, out: Tensor, rows: Tensor) -> None:
    native.module().normal(
        native.code(call.dtype), out.data_ptr(), *keyed.native_rows(rows, call.stream, call.site, call.antithetic, call.elements)
    )


def _normal_triton(call: Call, out: Tensor, rows: Tensor) -> None:
    from ttcfast.kernels import keyed as kernels

    kernels.launch_normal(out, rows, call.stream, call.site, call.elements, call.antithetic)


define.define_call(
    "normal",
    Call,
    "Tensor",
    check=check,
    backends=keyed.backends("normal", _normal_cpu, _normal_triton, normal_ref),
    empty=Call.empty,
    definition=normal_ref,
)
