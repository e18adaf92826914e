"""The analytical reward of declared fields (``FieldSpec``), which ``ops.arm`` calls for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttcfast.checks import one_of
from ttcfast.spec import ARMWeights, FieldSpec

from . import native, transforms
from .arm_common import (
    MOMENTA,
    SCALES,
    check_fields,
    check_states,
    in_candidates,
    in_float32,
    keep,
    kept,
    pad_sizes,
    pad_strides,
    small_fields,
    split,
)
from .arm_fields_ref import FieldCall, arm_fields_ref, scales
from .define import define_call
from .registry import Backend, cpu_device, register, triton_available, triton_device, yes

OTHERS = {"boundary": 0.1, "bounds": 0.1, "divergence": 0.1}  # penalties besides those of the conserved quantities, and their weights


class FieldScores(NamedTuple):
    """Results of ``ops.arm`` for a ``FieldSpec``.

    Attributes:
        score: ``[N, B]``, larger is better.
        terms: Penalty ``[N, B]`` of each conserved quantity by its name, of ``"mean"`` where channels have mean zero, and of
            ``"boundary"``, ``"bounds"`` and ``"divergence"``; all >= 0, and inf where the candidate is not finite.
        finite: Bool ``[N, B]``.
    """

    score: Tensor
    terms: dict[str, Tensor]
    finite: Tensor


def quantities_of(spec: FieldSpec) -> dict[str, tuple[int, ...]]:
    """Return the channels of each penalised integral: the conserved quantities, and ``"mean"`` for the channels of mean zero."""
    mean = tuple(map(spec.names.index, spec.mean_zero))
    return {**spec.conserved_groups, **({"mean": mean} if mean else {})}


def penalties_of(spec: FieldSpec) -> dict[str, float]:
    """Return the default weight of each penalty by its name, in the order of the results."""
    return {**dict.fromkeys(quantities_of(spec), 1.0), **OTHERS}


def weights_of(spec: FieldSpec, weights: ARMWeights | Mapping[str, float] | None) -> dict[str, float]:
    """Return the weight of each penalty by its name.

    Args:
        spec: Layout that names the quantities.
        weights: By name; default 1 for a conserved quantity and 0.1 for the others. ``ARMWeights`` assign the weights of mass, momentum
            and energy to quantities of these names, and that of positivity to the bounds.

    Raises:
        ValueError: A name is not a penalty, or a weight is negative or not finite.
    """
    default = penalties_of(spec)
    if weights is None:
        return default
    if isinstance(weights, ARMWeights):
        w = weights
        named = {"mass": w.w_mass, "momentum": w.w_momentum, "energy": w.w_energy, "boundary": w.w_bc, "bounds": w.w_positivity}
        return {name: named.get(name, value) for name, value in default.items()}
    given = dict(weights)
    for name, value in given.items():
        if name not in default:
            raise ValueError(f"weights names {name!r}, which is no penalty; the penalties are {', '.join(default)}")
        transforms.constant(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"the weight of {name!r} is {value}; a weight is finite and not negative")
    return {name: float(given.get(name, value)) for name, value in default.items()}


def flatten_fields(
    state: Tensor,
    candidates: Tensor,
    spec: FieldSpec,
    weights: ARMWeights | Mapping[str, float] | None,
    momentum: str,
    scale: str,
    expected: Tensor | None,
) -> FieldCall:
    """Return the arguments of ``torch.ops.ttcfast.arm_fields`` without the backend."""
    channels, quantities = candidates.shape[2], quantities_of(spec)
    groups, anchored, low, high = [-1] * channels, [1] * channels, [-math.inf] * channels, [math.inf] * channels
    for number, (name, members) in enumerate(quantities.items()):
        for c in members:
            groups[c], anchored[c] = number, int(name != "mean")
    for c, (least, most) in spec.bounded_channels.items():
        low[c], high[c] = -math.inf if least is None else least, math.inf if most is None else most
    return FieldCall(
        state,
        candidates,
        *split(spec.cell_volume, 1.0),
        spec.boundary_mask,
        *split(spec.boundary_value, 0.0),
        expected,
        groups,
        len(quantities),
        anchored,
        low,
        high,
        [c for vector in spec.solenoidal for c in vector],
        list(spec.distances),
        [int(wraps) for wraps in spec.periodic_axes],
        momentum,
        scale,
        list(weights_of(spec, weights).values()),
    )


def check(call: FieldCall) -> None:
    """Check everything that the implementations rely on."""
    check_states(call.state, call.candidates)
    check_fields(call.state, call.volumes, call.mask, call.values, expected=call.expected)
    channels, d = call.state.shape[1], call.state.ndim - 2
    for name in ("groups", "anchored", "low", "high"):
        if len(getattr(call, name)) != channels:
            raise ValueError(f"{name} has {len(getattr(call, name))} entries; state has {channels} channels, so give one for each")
    if not all(-1 <= group < call.quantities for group in call.groups):
        raise ValueError(f"groups is {call.groups}; give numbers from -1 to {call.quantities - 1}")
    if len(call.distances) != d or len(call.periodic) != d or len(call.vectors) % d:
        raise ValueError(
            f"vectors, distances and periodic are {call.vectors}, {call.distances}, {call.periodic}; give {d} for {d} space axes"
        )
    if call.vectors and d == 1:
        raise ValueError(f"vectors is {call.vectors} in one dimension, where a field without divergence is constant; give none")
    if not all(0 <= c < channels for c in call.vectors):
        raise ValueError(f"vectors is {call.vectors}; state has {channels} channels")
    one_of("momentum", call.mode, MOMENTA)
    one_of("scale", call.scale, SCALES)
    if len(call.weights) != call.quantities + len(OTHERS):
        raise ValueError(f"weights has {len(call.weights)} numbers; give one per quantity and {len(OTHERS)} more")
    want = (call.state.shape[0], channels)
    if call.expected is not None and (call.expected.dtype != torch.float64 or tuple(call.expected.shape) != want):
        raise ValueError(f"expected is {call.expected.dtype} {tuple(call.expected.shape)}; give float64 {want}")


def _outputs(call: FieldCall) -> tuple[Tensor, Tensor, Tensor]:
    n, b = call.candidates.shape[:2]
    score = call.candidates.new_empty((n, b), dtype=call.accumulator)
    penalties = score.new_empty((n, b, len(call.weights)))
    return score, penalties, torch.empty_like(score, dtype=torch.bool)


def _parameters(call: FieldCall) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return volumes, mask and values in the accumulation dtype, expected changes and the residuals' units in float64, all contiguous."""
    units, slope = scales(call)
    both = None if units is None or slope is None else torch.cat([units, slope.unsqueeze(1)], 1)
    expected = None if call.expected is None else call.expected.contiguous()
    return *small_fields(call), expected, both


def _cpu(call: FieldCall) -> tuple[Tensor, ...]:
    out, parameters = _outputs(call), _parameters(call)
    n_stride, *state_strides = pad_strides(call.state, 2)
    native.module().arm_fields(
        native.code(call.state.dtype),
        pad_sizes(call.candidates, 3),
        call.state.data_ptr(),
        [n_stride, 0, *state_strides],
        call.candidates.data_ptr(),
        pad_strides(call.candidates, 3),
        native.addresses(*parameters),
        call.volume,
        call.value,
        call.groups,
        call.quantities,
        call.anchored,
        call.low,
        call.high,
        call.vectors,
        call.distances,
        call.periodic,
        MOMENTA.index(call.mode),
        call.weights,
        native.addresses(*out),
        *native.threads_and_level(),
    )
    return out


def _triton(call: FieldCall) -> tuple[Tensor, ...]:
    from ttcfast.kernels import arm_fields as kernels

    out = _outputs(call)
    kernels.launch(call, out, *_parameters(call), mode=MOMENTA.index(call.mode))
    return out


BACKENDS = register(
    "arm_fields",
    Backend("cpu", native.available, lambda call: cpu_device(call.state), _cpu),
    Backend("triton", triton_available, lambda call: triton_device(call.state.device.type), _triton),
    Backend("reference", yes, yes, arm_fields_ref),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = FieldCall(*inputs[:-1])
    _check_constants(call)
    keep(ctx, call)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    call, _ = kept(ctx, FieldCall)
    grad = transforms.gradients(lambda candidates: _definition(call._replace(candidates=candidates)), [call.candidates], grads[:2])[0]
    return (None, grad, *[None] * (len(FieldCall._fields) - 1))


def _check_constants(call: FieldCall) -> None:
    for name, value in (("cell_volume", call.volumes), ("boundary_value", call.values), ("expected", call.expected)):
        transforms.constant(name, value)


def _definition(given: FieldCall) -> tuple[Tensor, ...]:
    _check_constants(given)
    return in_candidates(arm_fields_ref, given, 2)


define_call(
    "arm_fields",
    FieldCall,
    "(Tensor score, Tensor penalties, Tensor finite)",
    check=check,
    backends=BACKENDS,
    empty=_outputs,
    definition=_definition,
    whole="int",
    backward=_backward,
    setup_context=_setup,
    policy=in_float32,
)
