"""Scores candidates by the analytical reward: conservation, boundary and positivity penalties in one pass over them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from ttcfast.checks import one_of
from ttcfast.spec import ARMWeights, EulerSpec, FieldSpec, Momentum, Scale, StateSpec

from . import native, transforms
from .arguments import dense, of_type
from .arm_common import (
    MOMENTA,
    SCALES,
    changes_of,
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
from .arm_fields import FieldScores, flatten_fields, penalties_of, quantities_of, weights_of
from .arm_ref import Call, arm_backward, arm_ref
from .define import define_call, invoke
from .registry import Backend, cpu_device, register, triton_available, triton_device, yes


class ArmScores(NamedTuple):
    """Results of :func:`arm`, each ``[N, B]``; penalties are >= 0, and inf where the candidate is not finite."""

    score: Tensor
    mass: Tensor
    momentum: Tensor
    energy: Tensor
    boundary: Tensor
    positivity: Tensor
    finite: Tensor

    @property
    def terms(self) -> dict[str, Tensor]:
        """Return the penalties by name."""
        return dict(zip(TERMS, self[1:6]))


TERMS = ("mass", "momentum", "energy", "boundary", "positivity")
Weights: TypeAlias = ARMWeights | Mapping[str, float] | None
Expected: TypeAlias = Mapping[str, float | Tensor] | None


@overload
def arm(
    state: Tensor,
    candidates: Tensor,
    spec: EulerSpec,
    weights: Weights = ...,
    *,
    momentum: Momentum = ...,
    scale: Scale = ...,
    expected: Expected = ...,
    backend: str = ...,
) -> ArmScores: ...


@overload
def arm(
    state: Tensor,
    candidates: Tensor,
    spec: StateSpec,
    weights: Weights = ...,
    *,
    momentum: Momentum = ...,
    scale: Scale = ...,
    expected: Expected = ...,
    backend: str = ...,
) -> ArmScores | FieldScores: ...


def arm(
    state: Tensor,
    candidates: Tensor,
    spec: StateSpec,
    weights: Weights = None,
    *,
    momentum: Momentum = "sum",
    scale: Scale = "absolute",
    expected: Expected = None,
    backend: str = "auto",
) -> ArmScores | FieldScores:
    """Score candidate next states by physics; higher is better.

    Every conservation residual is a sum over cells of ``cell_volume * (candidate - state)`` with the difference taken per cell, since the
    difference of two float32 integrals can be wrong in its first digit. Primitive channels are first converted to per-cell differences
    of rho, rho u and E.

    The penalties of a gas (``EulerSpec``) are mass, momentum, energy, boundary and positivity. Those of other fields are one for
    each conserved quantity, by its name, ``mean`` where channels have mean zero, ``boundary``, ``bounds`` (the mean over cells of the
    distances from the declared intervals) and ``divergence`` (the mean over cells of the absolute divergence by central differences,
    where both neighbours exist; relative to the state's absolute slopes, so that 1 means no cancellation).

    Args:
        state: Current state, ``[N, C, *S]``, physical units, float32, float64 or bfloat16. Held constant by all derivatives.
        candidates: Possible next states, ``[N, B, C, *S]``, same dtype and device, any strides.
        spec: Roles of the channels, gamma, cell volume, boundary mask and values. Its tensors are on the state's device;
            they are parameters, converted to the accumulation dtype and not differentiable.
        weights: Weights of the penalties in the score, by name or, for a gas, as ``ARMWeights``; None takes the defaults, 1 for conserved
            quantities and 0.1 for the others.
        momentum: ``"sum"`` adds the components' residuals before the absolute value, so that they can cancel (TTC plan);
            ``"components"`` adds absolute values; ``"norm"`` takes the Euclidean norm.
        scale: ``"absolute"``, in units of the integral (TTC plan), or ``"relative"``: mass over the integral of abs(rho), energy
            over that of abs(E), momentum over that of rho (abs(u) + c), a quantity of other fields over that of its magnitude
            (abs(x), or a vector's length, so that values which cancel in the total still count), all of the state. Where the state has
            none of a quantity anywhere, its penalty is the mean change per volume; where it has no slopes, the divergence is absolute.
        expected: Change of conserved quantities over this step by name, due to sources or open boundaries: a number, ``[N]``, or
            ``[N, components]``, in units of the integral. It is subtracted from the residual. None expects no change.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``.

    Returns:
        ArmScores of ``[N, B]``, float32 (float64 for float64 states); for other fields FieldScores with the penalties in ``terms``.
        ``finite``, bool, tells whether every channel of the candidate is finite. ``boundary`` is the mean over masked cells and all
        channels of abs(candidate - value), 0 if nothing is masked. ``positivity`` is the mean over cells of relu(-rho) plus that of
        relu(-p). Both are absolute.
        A candidate that is not finite, or whose penalties overflow, scores -inf; no output is ever NaN.
        The score and every penalty are differentiable in the candidates, any number of times and in forward mode; the gradient is 0
        where the score is -inf. ``torch.func`` and ``torch.vmap`` evaluate its definition. Under ``torch.autocast`` states and
        candidates of two dtypes, or float16 ones, are widened to float32.
        Reads each candidate once, and vector fields once more for their divergence. Bitwise the same from run to run, for any split
        of B and any number of threads.

    Raises:
        ValueError: Shapes, channels, dtypes or devices do not match, B is 0, an option is unknown, or a parameter is a tensor that
            requires a gradient.
        BackendError: The requested backend cannot run; the message says why.

    Source: TTC plan, "Analytical Reward Model (ARM)". Terms are per candidate instead of batch means, see
    docs/design/decisions.md ("Penalties per candidate"), and differences are summed, see docs/design/decisions.md ("Sums of differences").
    """
    dense(state=state, candidates=candidates)
    of_type("spec", spec, StateSpec)
    of_type("weights", weights, ARMWeights, Mapping, type(None))
    one_of("momentum", momentum, MOMENTA)
    one_of("scale", scale, SCALES)
    spec.check_state("state", state, channel_axis=1)
    spec.check_state("candidates", candidates, channel_axis=2)
    if isinstance(spec, FieldSpec):
        change = changes_of(_rows(spec), expected, state, candidates.shape[2]) if expected else None
        given = flatten_fields(state, candidates, spec, weights, momentum, scale, change)
        score, penalties, finite = invoke("arm_fields", *given, backend)
        return FieldScores(score, dict(zip(penalties_of(spec), penalties.unbind(-1))), finite)
    assert isinstance(spec, EulerSpec)
    change = changes_of(_rows(spec), expected, state, len(spec.momentum) + 2) if expected else None
    call = flatten(state, candidates, spec, _weights(weights), momentum, scale, change)
    return ArmScores(*invoke("arm", *call, backend)[:7])


def arm_weights(spec: StateSpec, weights: Weights) -> dict[str, float]:
    """Returns the weight of each penalty of a layout by name.

    Raises:
        ValueError: A name is not a penalty of the layout, or a weight is negative or not finite.
    """
    if isinstance(spec, FieldSpec):
        return weights_of(spec, weights)
    return dict(zip(TERMS, vars(_weights(weights)).values()))


def check_quantities(argument: str, spec: StateSpec, names: Iterable[str]) -> None:
    """Raises ``ValueError`` for a name that is no conserved quantity of the layout."""
    known = _rows(spec)
    for name in names:
        if name not in known:
            raise ValueError(f"{argument} names {name!r}, which is no conserved quantity; they are {', '.join(known) or 'none'}")


def _rows(spec: StateSpec) -> dict[str, tuple[int, ...]]:
    """Return the rows of each penalised integral."""
    if isinstance(spec, FieldSpec):
        return quantities_of(spec)
    assert isinstance(spec, EulerSpec)
    last = len(spec.momentum) + 1
    return {"mass": (0,), "momentum": tuple(range(1, last)), "energy": (last,)}


def _weights(given: Weights) -> ARMWeights:
    if isinstance(given, Mapping):
        fields = dict(zip(TERMS, ("w_mass", "w_momentum", "w_energy", "w_bc", "w_positivity")))
        for name in given:
            if name not in fields:
                raise ValueError(f"weights names {name!r}, which is no penalty; the penalties are {', '.join(fields)}")
        given = ARMWeights(**{fields[name]: value for name, value in given.items()})
    given = ARMWeights() if given is None else given
    for name, value in vars(given).items():
        transforms.constant(name, value)
    return given


def flatten(
    state: Tensor, candidates: Tensor, spec: EulerSpec, weights: ARMWeights, momentum: str, scale: str, expected: Tensor | None = None
) -> Call:
    """Return the arguments of ``torch.ops.ttcfast.arm`` without the backend, flattened since torch's schemas hold no dataclasses."""
    return Call(
        state,
        candidates,
        *split(spec.gamma, 1.0),
        *split(spec.cell_volume, 1.0),
        spec.boundary_mask,
        *split(spec.boundary_value, 0.0),
        expected,
        spec.density,
        list(spec.momentum),
        -1 if spec.energy is None else spec.energy,
        -1 if spec.pressure is None else spec.pressure,
        spec.variables == "primitive",
        momentum,
        scale,
        [weights.w_mass, weights.w_momentum, weights.w_energy, weights.w_bc, weights.w_positivity],
    )


def check(call: Call) -> None:
    """Check everything that the implementations rely on, so that wrong arguments raise instead of corrupting memory."""
    check_states(call.state, call.candidates)
    _check_channels(call)
    _check_parameters(call)


def _check_channels(call: Call) -> None:
    required = (call.density, *call.velocity, call.pressure if call.primitive else call.energy)
    if min(required) < 0 or max(*required, call.energy, call.pressure) >= call.state.shape[1] or min(call.energy, call.pressure) < -1:
        _refuse_channels(call)
    if not 1 <= len(call.velocity) <= 3:
        raise ValueError(f"momentum names {len(call.velocity)} channels; 1 to 3 are supported")
    one_of("momentum", call.mode, MOMENTA)
    one_of("scale", call.scale, SCALES)
    if len(call.weights) != 5:
        raise ValueError(f"weights has {len(call.weights)} numbers; give five: mass, momentum, energy, boundary, positivity")


def _refuse_channels(call: Call) -> None:
    required = [("density", call.density), *(("momentum", c) for c in call.velocity)]
    required.append(("pressure", call.pressure) if call.primitive else ("energy", call.energy))
    optional = [("energy", call.energy), ("pressure", call.pressure)]
    for name, channel in required + [pair for pair in optional if pair[1] != -1]:
        if not 0 <= channel < call.state.shape[1]:
            raise ValueError(
                f"{name} is channel {channel}; state has shape {tuple(call.state.shape)}, so channels 0 to {call.state.shape[1] - 1}"
            )


def _check_parameters(call: Call) -> None:
    check_fields(call.state, call.volumes, call.mask, call.values, gamma=call.gammas, expected=call.expected)
    n, rows = call.state.shape[0], len(call.velocity) + 2
    if call.gammas is not None and tuple(call.gammas.shape) not in ((), (1,), (n,)):
        raise ValueError(f"gamma has shape {tuple(call.gammas.shape)}; state has N = {n}, so give a number or [{n}]")
    if call.expected is not None and (call.expected.dtype != torch.float64 or tuple(call.expected.shape) != (n, rows)):
        found = f"{call.expected.dtype} {tuple(call.expected.shape)}"
        raise ValueError(f"expected is {found}; give float64 {(n, rows)}, the change of the integrals of rho, each momentum and E")


def _outputs(call: Call) -> tuple[Tensor, ...]:
    """Allocate score, five penalties, finite and residuals."""
    n, b = call.candidates.shape[:2]
    like = call.candidates
    score = like.new_empty((n, b), dtype=call.accumulator)
    penalties = [torch.empty_like(score) for _ in range(5)]  # half the cost of eight calls of torch.empty
    finite = torch.empty_like(score, dtype=torch.bool)
    return (score, *penalties, finite, like.new_empty((n, b, len(call.velocity) + 2), dtype=torch.float64))


@functools.lru_cache(maxsize=64)  # small calls would pay for it again and again
def _gammas(gamma: float, n: int) -> Tensor:
    return torch.full((n,), gamma, dtype=torch.float64, device="cpu")


def _parameters(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return gamma [N] in float64, and ``small_fields``."""
    n = call.state.shape[0]
    if call.gammas is None:
        gammas = _gammas(call.gamma, n)
    else:
        gammas = call.gammas.to(torch.float64).expand(n).contiguous()
    return gammas, *small_fields(call)


def _arm_cpu(call: Call) -> tuple[Tensor, ...]:
    out = _outputs(call)
    parameters = (*_parameters(call), None if call.expected is None else call.expected.contiguous())
    gammas, volumes, mask, values, expected = native.addresses(*parameters)
    n_stride, *state_strides = pad_strides(call.state, 2)
    native.module().arm(
        native.code(call.state.dtype),
        pad_sizes(call.candidates, 3),
        call.state.data_ptr(),
        [n_stride, 0, *state_strides],
        call.candidates.data_ptr(),
        pad_strides(call.candidates, 3),
        gammas,
        volumes,
        call.volume,
        mask,
        values,
        call.value,
        expected,
        call.scale == "relative",
        call.density,
        call.velocity,
        call.energy,
        call.pressure,
        call.primitive,
        MOMENTA.index(call.mode),
        call.weights,
        native.addresses(*out),
        *native.threads_and_level(),
    )
    return out


def _arm_triton(call: Call) -> tuple[Tensor, ...]:
    from ttcfast.kernels import arm as kernels

    out = _outputs(call)
    kernels.launch(call, out, *small_fields(call), mode=MOMENTA.index(call.mode), relative=call.scale == "relative")
    return out


# The CPU prefers the C++ path, CUDA prefers Triton. Without the extension the CPU uses the reference, unless TRITON_INTERPRET is set.
BACKENDS = register(
    "arm",
    Backend("cpu", native.available, lambda call: cpu_device(call.state), _arm_cpu),
    Backend("triton", triton_available, lambda call: triton_device(call.state.device.type), _arm_triton),
    Backend("reference", yes, yes, arm_ref),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = Call(*inputs[:-1])
    _check_constants(call)
    keep(ctx, call, output[0], output[7])
    ctx.mark_non_differentiable(output[6], output[7])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    call, (score, residuals) = kept(ctx, Call)
    if transforms.watched(grads):
        grad = transforms.gradients(lambda candidates: _definition(call._replace(candidates=candidates)), [call.candidates], grads[:6])[0]
    else:
        grad = arm_backward(call, score, residuals, grads[:6])
    return (None, grad, *[None] * (len(Call._fields) - 1))


def _check_constants(call: Call) -> None:
    given = {"gamma": call.gammas, "cell_volume": call.volumes, "boundary_value": call.values, "expected": call.expected}
    for name, value in given.items():
        transforms.constant(name, value)


def _definition(given: Call) -> tuple[Tensor, ...]:
    _check_constants(given)
    return in_candidates(arm_ref, given, 6)


_PENALTIES = "Tensor mass, Tensor momentum, Tensor energy_, Tensor boundary, Tensor positivity"
define_call(
    "arm",
    Call,
    f"(Tensor score, {_PENALTIES}, Tensor finite, Tensor residuals)",
    check=check,
    backends=BACKENDS,
    empty=_outputs,
    definition=_definition,
    whole="int",
    backward=_backward,
    setup_context=_setup,
    policy=in_float32,
)
