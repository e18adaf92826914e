"""Integrates a state over the unit interval along a velocity MLP: K substeps of Heun or Euler as one operation, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttcfast.checks import at_least, one_of, whole

from . import native, transforms
from .arguments import dense, of_type
from .define import LIBRARY, arguments, define, define_call
from .heun import DTYPES, centered, check_group
from .mlp_flow_loop import CPU, FROZEN, NOTHING, REFERENCE, TRAINED, TRITON, Backward, Call, Forward, Kept, Pieces, Result, buffers
from .norm_mish import EPS, Layer, norm_mish_ref
from .registry import Backend, Reason, choose, cpu_device, register, triton_available, triton_device, yes

METHODS = ("heun", "euler")


class VelocityMLP(NamedTuple):
    """Parameters of a velocity MLP. Hidden layers are product, bias, LayerNorm and Mish; the last layer is product and bias.

    The first product is split: ``weights[0]`` acts on the state. Its action on conditions and time, and its bias, are passed as ``rows``
    and ``times``, since they change once per call and not once per evaluation.
    """

    weights: list[Tensor]  # [U1, D], [U2, U1], ..., [D, Un]
    biases: list[Tensor]  # of all products but the first: [U2], ..., [D]
    scales: list[Tensor]  # LayerNorm's weight: [U1], ..., [Un]
    shifts: list[Tensor]  # LayerNorm's bias: [U1], ..., [Un]


def mlp_flow(
    z: Tensor,
    rows: Tensor,
    times: Tensor,
    network: VelocityMLP,
    *,
    method: str = "heun",
    substeps: int = 2,
    group: int = 0,
    eps: float = EPS,
    matmul_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Integrate ``dz/dtau = velocity(z, tau)`` from 0 to 1.

    At the j-th time the velocity is ``W_n a_{n-1} + b_n`` minus its group means, with ``a_1 = mish(LN(W_1 z + rows + times[j]))`` and
    ``a_i = mish(LN(W_i a_{i-1} + b_i))``.

    Args:
        z: State at 0, ``[B, D]``, float32 or float64.
        rows: Added to the first product of each row (conditions and bias), ``[B, U1]``, dtype of ``z``.
        times: Added to the first product at each distinct time, ``[K + 1, U1]`` for Heun, ``[K, U1]`` for Euler: at k / K.
        network: The other parameters, dtype of ``z``; those of the products may have any strides.
        method: ``"heun"`` (2 K evaluations) or ``"euler"`` (K).
        substeps: Number K of substeps, at least 1.
        group: See :func:`ttcfast.ops.heun_predict`; 0 leaves the velocity unchanged.
        eps: Added to the variance in LayerNorm.
        matmul_dtype: Dtype of the matrix products; None means that of ``z``. ``torch.bfloat16`` with float32 ``z`` rounds inputs and
            results of the products to bfloat16; state, statistics and all sums stay float32.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, for the operations between the products. C++ takes no bfloat16.

    Returns:
        State at 1, shape and dtype of ``z``. Differentiable. If neither the network nor ``times`` requires a gradient (frozen dynamics),
        the backward pass forms no weight gradient and costs as many products as the forward pass; otherwise it forms each weight's gradient
        as one product over all evaluations. Memory saved for the backward pass: none without gradients; the hidden products if frozen; also
        the inputs if trained. Second derivatives, forward mode, ``torch.func`` and ``torch.vmap`` (of stacked parameters too) evaluate
        the plain loop of its definition. Under ``torch.autocast`` the state and all parameters are converted to float32, the
        result's dtype, and products are computed in bfloat16 if that is autocast's dtype.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or an option is unknown.
        BackendError: The requested backend cannot run; the message says why.

    Source: Flow plan, "ODE Integrator Choice and Justification"; docs/design/decisions.md ("Integrators").
    """
    dense(z=z, rows=rows, times=times)
    of_type("network", network, VelocityMLP)
    for name, part in zip(VelocityMLP._fields, network):
        of_type(name, part, list, tuple)
        dense(**{f"{name}[{i}]": t for i, t in enumerate(part)})
    if matmul_dtype not in (None, z.dtype) and (matmul_dtype, z.dtype) != (torch.bfloat16, torch.float32):
        raise ValueError(f"matmul_dtype is {matmul_dtype} and z {z.dtype}; give None, or torch.bfloat16 with a float32 z")
    half = matmul_dtype == torch.bfloat16 and z.dtype == torch.float32
    transforms.constant("eps", eps)
    keep = NOTHING
    if torch.is_grad_enabled():
        if times.requires_grad or any(t.requires_grad for part in network for t in part):
            keep = TRAINED
        elif z.requires_grad or rows.requires_grad:
            keep = FROZEN
    result: Tensor = torch.ops.ttcfast.mlp_flow(z, rows, times, *map(list, network), method, substeps, group, eps, half, keep, backend)[0]
    return result


def mlp_flow_ref(
    z: Tensor,
    rows: Tensor,
    times: Tensor,
    network: VelocityMLP,
    method: str,
    substeps: int,
    group: int,
    eps: float,
    matmul_dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition, differentiated by autograd."""
    dtype = matmul_dtype or z.dtype

    def velocity(z: Tensor, j: int) -> Tensor:
        x = z
        # Not F.layer_norm, whose derivatives of forward-mode derivatives are wrong (pytorch#196700).
        for weight, bias, scale, shift in zip(network.weights, [times[j], *network.biases], network.scales, network.shifts):
            product = x.to(dtype) @ weight.to(dtype).t()
            x = norm_mish_ref(product, rows if x is z else None, Layer(bias, scale, shift, eps))[0]
        x = torch.nn.functional.linear(x, network.weights[-1].to(dtype), network.biases[-1].to(dtype))
        return centered(x.to(z.dtype), group)

    dt = 1 / substeps
    for k in range(substeps):
        k1 = velocity(z, k)
        z = z + dt * k1 if method == "euler" else z + (0.5 * dt) * (k1 + velocity(z + dt * k1, k + 1))
    return z


def check(call: Call) -> None:
    """Check everything that the implementations rely on."""
    one_of("method", call.method, METHODS)
    whole("substeps", call.substeps, 1)
    one_of("keep", call.keep, (NOTHING, FROZEN, TRAINED))
    at_least("eps", call.eps, 0)
    z = call.z
    if z.ndim != 2 or z.dtype not in DTYPES:
        raise ValueError(f"z is {z.dtype} {tuple(z.shape)}; give [B, D], float32 or float64")
    check_group("group", call.group, z.shape[1])
    hidden = len(call.weights) - 1
    if hidden < 1 or len(call.biases) != hidden or len(call.scales) != hidden or len(call.shifts) != hidden:
        counts = ", ".join(f"{len(part)} {name}" for name, part in zip(VelocityMLP._fields, call[3:7]))
        raise ValueError(f"the network has {counts}; give n + 1 weights with n of the others, n at least 1")
    widths = [w.shape[0] for w in call.weights[:-1]]
    times = call.substeps + (call.method == "heun")
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("rows", call.rows, (z.shape[0], widths[0])),
        ("times", call.times, (times, widths[0])),
    ]
    sizes = [z.shape[1], *widths, z.shape[1]]
    expected += [(f"weights[{i}]", w, (sizes[i + 1], sizes[i])) for i, w in enumerate(call.weights)]
    expected += [(f"biases[{i}]", b, (sizes[i + 2],)) for i, b in enumerate(call.biases)]
    for name, part in (("scales", call.scales), ("shifts", call.shifts)):
        expected += [(f"{name}[{i}]", t, (sizes[i + 1],)) for i, t in enumerate(part)]
    for name, t, shape in expected:
        if tuple(t.shape) != shape or t.dtype != z.dtype or t.device != z.device:
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}; with z {z.dtype} {tuple(z.shape)} on {z.device} "
                f"and widths {widths} it must be {z.dtype} {shape}"
            )


def _run_with(pieces: Pieces) -> Any:
    def run(call: Call) -> tuple[Tensor, list[Tensor]]:
        forward = Forward(call, pieces)
        result = forward.run()
        return result, forward.kept.flat() if call.keep != NOTHING else []

    return run


def _contiguous(call: Call) -> Reason:
    for name in ("z", "rows", "times", "biases", "scales", "shifts"):
        value = getattr(call, name)
        for t in value if isinstance(value, list) else [value]:
            if not t.is_contiguous():
                return f"{name} has strides {t.stride()}; call .contiguous() on it"
    return None


def _cpu_supports(call: Call) -> Reason:
    half = "matmul_dtype is torch.bfloat16; the C++ path takes float32 or float64" if call.half else None
    return cpu_device(call.z) or half or _contiguous(call)


def _triton_supports(call: Call) -> Reason:
    return triton_device(call.z.device.type) or _contiguous(call)


BACKENDS = register(
    "mlp_flow",
    Backend("cpu", native.available, _cpu_supports, _run_with(CPU)),
    Backend("triton", triton_available, _triton_supports, _run_with(TRITON)),
    Backend("reference", yes, yes, _run_with(REFERENCE)),
)
_PIECES = {"cpu": CPU, "triton": TRITON, "reference": REFERENCE}


def _run_backward(grad: Tensor, *args: Any) -> Result:
    *flat, kept, backend = args
    call = Call(*flat)
    pieces = _PIECES[choose("mlp_flow", BACKENDS, backend, call).name]
    return Backward(call, Kept.of(kept, len(call.scales)), pieces).run(grad.contiguous())


def _empty(call: Call) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(call.z), buffers(call).flat() if call.keep != NOTHING else []


def _fake_backward(grad: Tensor, *args: Any) -> Result:
    call = Call(*args[:-2])
    if call.keep != TRAINED:
        return Result(torch.empty_like(call.z), torch.empty_like(call.rows), call.times.new_empty(0), [], [], [], [])
    parts = [[t.new_empty(t.shape) for t in part] for part in call[3:7]]
    return Result(torch.empty_like(call.z), torch.empty_like(call.rows), torch.empty_like(call.times), *parts)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1])
    call = Call(*inputs[:-1])
    n = len(call.scales)
    wanted = TRAINED if any(ctx.needs_input_grad[2 : 4 + 4 * n]) else FROZEN
    if call.keep < wanted:
        raise ValueError(f"keep is {call.keep}; the gradients that are asked for need {wanted}. ttcfast.ops.mlp_flow chooses it")
    ctx.options, ctx.hidden = inputs[7:], n
    ctx.save_for_backward(*call[:3], *call.weights, *call.biases, *call.scales, *call.shifts, *output[1])


def _grouped(flat: Sequence[Any], hidden: int) -> list[Any]:
    """Return an entry for each tensor, grouped as in the operation's arguments: z, rows, times, and the four lists of parameters."""
    parts, rest = list(flat[:3]), list(flat[3:])
    for count in (hidden + 1, hidden, hidden, hidden):
        parts.append(rest[:count])
        rest = rest[count:]
    return parts


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    n = ctx.hidden
    *options, keep, backend = ctx.options
    if grad is None:
        return (*_grouped([None] * (4 + 4 * n), n), *[None] * 7)
    saved = list(ctx.saved_tensors)
    tensors, kept = saved[: 4 + 4 * n], saved[4 + 4 * n :]
    if transforms.watched([grad]):
        again = transforms.gradients(lambda *places: _definition(Call._make([*_grouped(places, n), *options, keep])), tensors, [grad])
        return (*_grouped(again, n), *[None] * 7)
    z, rows, times, *parts = _grouped(tensors, n)
    found = Result(*torch.ops.ttcfast.mlp_flow_backward(grad, z, rows, times, *parts, *options, keep, kept, backend))
    if keep != TRAINED:
        return (*_grouped([found.z, found.rows, *[None] * (2 + 4 * n)], n), *[None] * 7)
    return (*found, *[None] * 7)


def _definition(call: Call) -> tuple[Tensor, list[Tensor]]:
    options = (call.method, call.substeps, call.group, call.eps, call.matmul_dtype)
    return mlp_flow_ref(call.z, call.rows, call.times, VelocityMLP(*call[3:7]), *options), []


def _mixed(op: Callable[..., tuple[Tensor, list[Tensor]]], *args: Any) -> tuple[Tensor, list[Tensor]]:
    """The autocast policy: state and parameters in float32, products in bfloat16 if that is autocast's dtype."""
    call = Call(*args[:-1])
    dtype = transforms.wider(call.z, *call.weights)
    z, rows, times = (t.to(dtype) for t in call[:3])
    parts = ([t.to(dtype) for t in part] for part in call[3:7])
    half = call.half or (dtype == torch.float32 and torch.get_autocast_dtype(z.device.type) == torch.bfloat16)
    return op(z, rows, times, *parts, call.method, call.substeps, call.group, call.eps, half, call.keep, args[-1])


define_call(
    "mlp_flow",
    Call,
    "(Tensor, Tensor[])",
    check=check,
    backends=BACKENDS,
    empty=_empty,
    definition=_definition,
    whole="int",
    backward=_backward,
    setup_context=_setup,
    policy=_mixed,
)
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor[], Tensor[], Tensor[], Tensor[])"
_SCHEMA = f"mlp_flow_backward(Tensor grad, {arguments(Call, 'int')}, Tensor[] kept, str backend) -> {_GRADIENTS}"
define(_SCHEMA, _run_backward, _fake_backward)
_refused = transforms.refuse("mlp_flow_backward")
transforms.register(LIBRARY, "mlp_flow_backward", _refused, backward=_refused)
