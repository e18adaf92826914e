"""Rolls a policy out inside frozen dynamics, both of them MLPs: all steps as one operation, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import mlp_flow_small as small
from . import native, transforms
from .arguments import dense, dense_parts, lists
from .mlp import MLP, first_bias, mlp
from .mlp_flow import VelocityMLP, check, grouped, is_native, mlp_flow
from .mlp_flow_loop import FROZEN, NOTHING, TRAINED, Call
from .norm_mish import EPS


def closed_loop(
    z: Tensor,
    offsets: Tensor,
    policy: MLP,
    weight: Tensor,
    times: Tensor,
    network: VelocityMLP,
    *,
    method: str = "heun",
    substeps: int = 2,
    group: int = 0,
    eps: float = EPS,
    policy_eps: float = EPS,
    detach: bool = False,
) -> tuple[Tensor, Tensor]:
    """Alternate ``a = tanh(policy(z) + offset)`` and one step of :func:`ttcfast.ops.mlp_flow` with ``rows = weight a``.

    Args:
        z: First states, ``[B, D]``, float32 or float64; ``[S, B, D]`` for S policies, each in its own dynamics.
        offsets: Added to the policy's output before tanh, such as scaled noise, ``[T, B, A]`` or ``[T, S, B, A]``.
        policy: Network from states to actions.
        weight: Action's part of the first product of the dynamics, ``[U1, A]``.
        times, network, method, substeps, group, eps: As in :func:`ttcfast.ops.mlp_flow`.
        policy_eps: Added to the variance in the policy's LayerNorm.
        detach: Whether the policy sees states without their gradient, which then reaches actions through the dynamics alone.

    Returns:
        The states after each step, ``[T, B, D]``, and the actions ``[T, B, A]``; ``[T, S, ...]`` for S policies. Differentiable. On the
        CPU, small networks (see :func:`ttcfast.ops.mlp_flow`) run as one C++ call in each direction if the dynamics need no gradient;
        everything else is a loop over the two operations.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or an option is unknown.
    """
    lists("policy", policy, MLP)
    lists("network", network, VelocityMLP)
    if not isinstance(detach, bool):
        raise ValueError(f"detach is {detach!r}; give True or False".replace("\n", " "))
    plain = not isinstance(eps, Tensor) and not isinstance(policy_eps, Tensor)
    plain = plain and transforms.immediate(z, offsets, weight, times, *(t for part in (*policy, *network) for t in part))
    if not plain:
        transforms.constant("eps", eps)
        transforms.constant("policy_eps", policy_eps)
        dense(z=z, offsets=offsets, weight=weight, times=times)
        dense_parts(policy)
        dense_parts(network)
    z, offsets = z.contiguous(), offsets.contiguous()
    acts, moves = _calls(z, offsets, policy, weight, times, network, (method, substeps, group, eps), policy_eps)
    flow = [weight, *_parameters(moves)]
    given = [z, offsets, *flow, *_parameters(acts)]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    frozen = not (wanted and any(t.requires_grad for t in flow))
    if not (frozen and plain and is_native(acts) and is_native(moves)):
        return closed_loop_ref(z, offsets, policy, weight, times, network, (method, substeps, group, eps), policy_eps, detach)
    if not wanted:
        return _forward(small.problem(acts, [], moves.steps), small.problem(moves, []), moves, offsets, weight)
    apply: Any = _AtOnce.apply
    states, actions = apply(*given, acts, moves, detach)
    return states, actions


def closed_loop_ref(
    z: Tensor,
    offsets: Tensor,
    policy: MLP,
    weight: Tensor,
    times: Tensor,
    network: VelocityMLP,
    options: tuple[str, int, int, float],
    policy_eps: float,
    detach: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, a loop over the operations; ``options`` are method, substeps, group and eps."""
    method, substeps, group, eps = options
    states, actions = [], []
    for offset in offsets.unbind(0):
        actions.append(torch.tanh(mlp(z.detach() if detach else z, policy, eps=policy_eps) + offset))
        z = mlp_flow(z, actions[-1] @ weight.mT, times, network, method=method, substeps=substeps, group=group, eps=eps)
        states.append(z)
    return torch.stack(states), torch.stack(actions)


def _calls(
    z: Tensor,
    offsets: Tensor,
    policy: MLP,
    weight: Tensor,
    times: Tensor,
    network: VelocityMLP,
    options: tuple[str, int, int, float],
    policy_eps: float,
) -> tuple[Call, Call]:
    """Return the calls of policy and dynamics, checked; the policy's is that of the first step, and the rows of the dynamics are empty."""
    try:
        parts: Any = [list(part) for part in (policy.weights, policy.biases[1:], policy.scales, policy.shifts)]
        acts = Call._make([z, None, first_bias(policy), *parts, "map", 1, 0, policy_eps, False, NOTHING])
        check(acts)
    except ValueError as error:
        raise ValueError(f"policy: {error}") from None
    outputs, width = policy.weights[-1].shape[-2], times.shape[-1] if times.ndim else 0
    for name, t, shape in (
        ("offsets", offsets, (*offsets.shape[:1], *z.shape[:-1], outputs)),
        ("weight", weight, (*z.shape[:-2], width, outputs)),
    ):
        if t.shape != shape or t.dtype != z.dtype or t.device != z.device:
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}; with z {z.dtype} {tuple(z.shape)} on {z.device}, times "
                f"{tuple(times.shape)} and a policy of {outputs} outputs it must be {z.dtype} {shape}"
            )
    if not len(offsets):
        raise ValueError("offsets has no step; give at least one")
    rows = offsets.new_empty((*offsets.shape[:-1], width))
    moves = Call._make([z, rows, times, *(list(part) for part in network), *options, False, NOTHING])
    check(moves)
    return acts, moves


def _parameters(call: Call) -> list[Tensor]:
    """Return the parameters, in the order of :func:`ttcfast.ops.mlp_flow.grouped` after z and rows."""
    return [call.times, *call.weights, *call.biases, *call.scales, *call.shifts]


def _loop(moves_rows: Tensor, offsets: Tensor, weight: Tensor, detach: bool = False) -> tuple[Any, ...]:
    """Return the arguments of both extension functions after the problems."""
    strides = weight.stride() if weight.ndim == 3 else (0, *weight.stride())
    return native.addresses(offsets, weight, moves_rows), strides, detach


def _forward(acts: Any, flow: Any, moves: Call, offsets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return states and actions, and fill the rows of ``moves``, given the problems of both calls."""
    assert moves.rows is not None
    states, actions = moves.empty(), torch.empty_like(offsets)
    native.module().closed_loop(acts, flow, *_loop(moves.rows, offsets, weight), states.data_ptr(), actions.data_ptr())
    return states, actions


class _AtOnce(torch.autograd.Function):
    """The C++ loop; the arguments are z, offsets, weight, the parameters of dynamics and policy, both calls, and ``detach``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *given, acts, moves, ctx.detach = args
        acts, moves = acts._replace(keep=TRAINED), moves._replace(keep=FROZEN)
        ctx.acts, ctx.flow = small.hold(acts, moves.steps), small.hold(moves)
        states, actions = _forward(ctx.acts.problem, ctx.flow.problem, moves, given[1], given[2])
        ctx.hidden, ctx.options = (len(acts.scales), len(moves.scales)), (acts[7:], moves[7:])
        ctx.save_for_backward(*given, moves.rows, actions)
        return states, actions

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *given, rows, actions = ctx.saved_tensors
        if transforms.watched(grads):
            return (*transforms.gradients(lambda *places: _again(ctx, places), given, grads), None, None, None)
        z, offsets, weight, *parameters = given
        of_flow = 2 + 4 * ctx.hidden[1]
        grads = tuple(g.contiguous() for g in grads)  # held until the call is over
        found = [t.new_empty(t.shape) for t in (z, offsets, *parameters[of_flow:])]
        addresses = native.addresses(*found)

        def call(place: int, rows: Tensor | None) -> Call:
            return Call._make([z, rows, *_grouped(ctx, parameters)[place], *ctx.options[place]])

        native.module().closed_loop_backward(
            ctx.acts.again([z, None, *parameters[of_flow:]], lambda: call(0, None), len(offsets)),
            ctx.flow.again([z, rows, *parameters[:of_flow]], lambda: call(1, rows)),
            *_loop(rows, offsets, weight, ctx.detach),
            actions.data_ptr(),
            native.addresses(*grads),
            addresses[:2],
            [0, 0, *addresses[2:]],
        )
        return (*found[:2], *[None] * (1 + of_flow), *found[2:], None, None, None)


def _grouped(ctx: Any, parameters: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
    """Return times and the lists of parameters, of the policy and of the dynamics; these come first in ``parameters``."""
    of_policy, of_flow = ctx.hidden
    split = 2 + 4 * of_flow
    return grouped([None, None, *parameters[split:]], of_policy)[2:], grouped([None, None, *parameters[:split]], of_flow)[2:]


def _again(ctx: Any, places: Any) -> tuple[Tensor, Tensor]:
    """Evaluate the definition on the tensors of a call."""
    z, offsets, weight, *parameters = places
    (first, weights, biases, scales, shifts), (times, *network) = _grouped(ctx, parameters)
    policy = MLP(weights, [first.squeeze(-2), *biases], scales, shifts)
    (_, _, _, policy_eps, *_), (method, substeps, group, eps, *_) = ctx.options
    how = (method, substeps, group, eps)
    return closed_loop_ref(z, offsets, policy, weight, times, VelocityMLP(*network), how, policy_eps, ctx.detach)
