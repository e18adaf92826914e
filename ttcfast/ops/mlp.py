"""Evaluates an MLP of Linear, LayerNorm and Mish, or several at once, as one operation, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import transforms
from .arguments import dense, dense_parts, lists
from .mlp_flow import evaluate
from .norm_mish import EPS


class MLP(NamedTuple):
    """Parameters of an MLP. Hidden layers are product, bias, LayerNorm and Mish; the last layer is product and bias.

    For S networks every tensor begins with an axis of size S.
    """

    weights: list[Tensor]  # [U1, I], [U2, U1], ..., [O, Un]
    biases: list[Tensor]  # [U1], ..., [O]
    scales: list[Tensor]  # LayerNorm's weight: [U1], ..., [Un]
    shifts: list[Tensor]  # LayerNorm's bias: [U1], ..., [Un]


def mlp(x: Tensor, network: MLP, *, rows: Tensor | None = None, eps: float = EPS, backend: str = "auto") -> Tensor:
    """Return ``W_n a_{n-1} + b_n`` with ``a_1 = mish(LN(W_1 x + rows + b_1))`` and ``a_i = mish(LN(W_i a_{i-1} + b_i))``.

    It is ``torch.ops.ttcfast.mlp_flow`` with ``method="map"``.

    Args:
        x: ``[..., I]``, float32 or float64; ``[..., S, B, I]`` for S networks.
        network: Parameters, dtype of ``x``; the weights may have any strides.
        rows: Added to the first product of each row, ``[..., U1]``: the part of the product that several calls share. None: 0.
        eps: Added to the variance in LayerNorm.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, for the operations between the products.

    Returns:
        ``[..., O]``, dtype of ``x``. Derivatives, what is saved for them, transforms and autocast are those of
        :func:`ttcfast.ops.mlp_flow`.

    Raises:
        ValueError: Shapes, dtypes or devices do not match.
        BackendError: The requested backend cannot run; the message says why.
    """
    lists("network", network, MLP)
    plain = not isinstance(eps, Tensor) and transforms.immediate(
        x, *(() if rows is None else (rows,)), *(t for part in network for t in part)
    )
    if not plain:
        dense(x=x, **{} if rows is None else {"rows": rows})
        dense_parts(network)
        transforms.constant("eps", eps)
    first = first_bias(network)
    weights, biases, scales, shifts = network
    stacked = weights[0].ndim == 3
    if x.ndim < (3 if stacked else 1):
        raise ValueError(f"x has shape {tuple(x.shape)}; give {'[..., S, B, I] for several networks' if stacked else '[..., I]'}")
    of_x = weights[0]
    if x.shape[-1] != of_x.shape[-1] or (stacked and x.shape[-3] != of_x.shape[0]) or x.dtype != of_x.dtype or x.device != of_x.device:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device} and weights[0] {of_x.dtype} {tuple(of_x.shape)} on {of_x.device}; "
            "give an x with the network's dtype, device and sizes"
        )
    if rows is not None and (rows.ndim != x.ndim or rows.shape[:-1] != x.shape[:-1]):
        raise ValueError(f"rows has shape {tuple(rows.shape)} and x {tuple(x.shape)}; their leading axes must be the same")
    flat, given = _flat(x, stacked), None if rows is None else _flat(rows, stacked)
    parts = list(weights), list(biases[1:]), list(scales), list(shifts)
    found = evaluate(plain, flat, given, first, *parts, "map", 1, 0, eps, False, backend)
    if flat is x:
        return found
    if not stacked:
        return found.reshape(*x.shape[:-1], found.shape[-1])
    by_set: Tensor = found.unflatten(1, (*x.shape[:-3], x.shape[-2]))
    return by_set.movedim(0, -3)


def first_bias(network: MLP) -> Tensor:
    """Return the first bias as ``[..., 1, U1]``, what :func:`ttcfast.ops.mlp_flow` calls ``times``, having checked all.

    Raises:
        ValueError: The numbers of parameters do not fit, or a bias does not fit its weight.
    """
    weights, biases, scales, shifts = network
    if len(weights) < 2 or len(biases) != len(weights) or len(scales) != len(weights) - 1 or len(shifts) != len(weights) - 1:
        counts = ", ".join(f"{len(part)} {name}" for name, part in zip(MLP._fields, network))
        raise ValueError(f"the network has {counts}; give n + 1 weights and biases, and n scales and shifts, n at least 1")
    for i, (w, b) in enumerate(zip(weights, biases)):
        if b.shape != w.shape[:-1] or b.dtype != w.dtype or b.device != w.device or not b.ndim:
            raise ValueError(
                f"biases[{i}] is {b.dtype} {tuple(b.shape)} on {b.device} and weights[{i}] {w.dtype} {tuple(w.shape)} on {w.device}; "
                "give a bias with the weight's dtype, device and leading sizes"
            )
    return biases[0].unsqueeze(-2)


def _flat(x: Tensor, stacked: bool) -> Tensor:
    """Return ``[..., I]`` as ``[N, I]``, and ``[..., S, B, I]`` for S networks as ``[S, N, I]``."""
    if x.ndim == 2 + stacked:
        return x
    return x.movedim(-3, 0).flatten(1, -2) if stacked else x.reshape(x.shape[:-1].numel(), x.shape[-1])
