"""Integrates a state along a velocity MLP, or maps it by an MLP: all steps and substeps as one operation, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttcfast.checks import at_least, one_of, whole

from . import mlp_flow_small as small
from . import native, transforms
from .arguments import dense, dense_parts, lists
from .define import LIBRARY, arguments, define, define_call
from .heun import DTYPES, centered, check_group
from .mlp_flow_loop import CPU, FROZEN, NOTHING, REFERENCE, TRAINED, TRITON, Backward, Call, Forward, Kept, Pieces, Result, buffers
from .mlp_flow_small import METHODS
from .norm_mish import EPS, Layer, norm_mish_ref
from .registry import Backend, Reason, choose, cpu_device, register, triton_available, triton_device, yes


class VelocityMLP(NamedTuple):
    """Parameters of a velocity MLP. Hidden layers are product, bias, LayerNorm and Mish; the last layer is product and bias.

    The first product is split: ``weights[0]`` acts on the state. Its action on conditions and time, and its bias, are passed as ``rows``
    and ``times``, since they change once per call and not once per evaluation. For S networks every tensor begins with an axis of size S.
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
    """Integrate ``dz/dtau = velocity(z, tau)`` from 0 to 1, once or over several steps.

    At the j-th time the velocity is ``W_n a_{n-1} + b_n`` minus its group means, with ``a_1 = mish(LN(W_1 z + rows + times[j]))`` and
    ``a_i = mish(LN(W_i a_{i-1} + b_i))``.

    Args:
        z: State at 0, ``[B, D]``, float32 or float64; ``[S, B, D]`` for S networks, each with its own states.
        rows: Added to the first product of each row (conditions and bias), ``[B, U1]``, dtype of ``z``; ``[T, B, U1]`` for T steps, each
            from where the one before ended. S networks: ``[S, B, U1]`` or ``[T, S, B, U1]``.
        times: Added to the first product at each distinct time, ``[K + 1, U1]`` for Heun, ``[K, U1]`` for Euler: at k / K. S networks:
            ``[S, ...]``.
        network: The other parameters, dtype of ``z``; those of the products may have any strides.
        method: ``"heun"`` (2 K evaluations), ``"euler"`` (K), or ``"map"``: the velocity itself is the state at 1, K is 1 and ``group`` 0.
        substeps: Number K of substeps, at least 1.
        group: See :func:`ttcfast.ops.heun_predict`; 0 leaves the velocity unchanged.
        eps: Added to the variance in LayerNorm.
        matmul_dtype: Dtype of the matrix products; None means that of ``z``. ``torch.bfloat16`` with float32 ``z`` rounds inputs and
            results of the products to bfloat16; state, statistics and all sums stay float32.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``, for the operations between the products. C++ takes no bfloat16.

    Returns:
        State at 1, shape and dtype of ``z``; with T steps the state after each, ``[T, B, D]`` or ``[T, S, B, D]``. Differentiable. If
        neither the network nor ``times`` requires a gradient (frozen dynamics), the backward pass forms no weight gradient and costs as
        many products as the forward pass; otherwise it forms each weight's gradient as one product over all evaluations. Memory saved for
        the backward pass: none without gradients; the hidden products if frozen; also the inputs if trained. Second derivatives, forward
        mode, ``torch.func`` and ``torch.vmap`` (of stacked parameters too) evaluate the plain loop of its definition. Under
        ``torch.autocast`` the state and all parameters are converted to float32, the result's dtype, and products are computed in bfloat16
        if that is autocast's dtype.

        On the CPU, networks of at most 256 entries per layer run as one C++ call, products included, others by torch's products.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or an option is unknown.
        BackendError: The requested backend cannot run; the message says why.

    Source: Flow plan, "ODE Integrator Choice and Justification"; docs/design/decisions.md ("Integrators").
    """
    lists("network", network, VelocityMLP)
    plain = not isinstance(eps, Tensor) and transforms.immediate(z, rows, times, *(t for part in network for t in part))
    if not plain:
        dense(z=z, rows=rows, times=times)
        dense_parts(network)
        transforms.constant("eps", eps)
    if matmul_dtype not in (None, z.dtype) and (matmul_dtype, z.dtype) != (torch.bfloat16, torch.float32):
        raise ValueError(f"matmul_dtype is {matmul_dtype} and z {z.dtype}; give None, or torch.bfloat16 with a float32 z")
    half = matmul_dtype == torch.bfloat16 and z.dtype == torch.float32
    return evaluate(plain, z, rows, times, *map(list, network), method, substeps, group, eps, half, backend)


def evaluate(plain: bool, z: Tensor, rows: Tensor | None, times: Tensor, *rest: Any) -> Tensor:
    """Call the operation with what the gradients need kept.

    ``plain`` is what :func:`transforms.immediate` says of the tensors, ``rest`` the further arguments but ``keep``.
    """
    *given, backend = rest
    keep = NOTHING
    if torch.is_grad_enabled():
        if times.requires_grad or any(t.requires_grad for part in given[:4] for t in part):
            keep = TRAINED
        elif z.requires_grad or (rows is not None and rows.requires_grad):
            keep = FROZEN
    if not plain:
        found = torch.ops.ttcfast.mlp_flow(z, rows, times, *given, keep, backend)[0]
    elif keep == NOTHING:
        found = _run(z, rows, times, *given, keep, backend)[0]
    else:
        apply: Any = _Immediate.apply
        found = apply(z, rows, times, *(t for part in given[:4] for t in part), *given[4:], keep, backend, len(given[2]))
    return found  # type: ignore[no-any-return]


def mlp_flow_ref(
    z: Tensor,
    rows: Tensor | None,
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

    stacked = network.weights[0].ndim == 3

    def row(t: Tensor) -> Tensor:
        return t.unsqueeze(-2) if stacked else t

    def velocity(z: Tensor, given: Tensor | None, j: int) -> Tensor:
        x = z
        # Not F.layer_norm, whose derivatives of forward-mode derivatives are wrong (pytorch#196700).
        for weight, bias, scale, shift in zip(network.weights, [times.select(-2, j), *network.biases], network.scales, network.shifts):
            product = x.to(dtype) @ weight.to(dtype).mT
            x = norm_mish_ref(product, given if x is z else None, Layer(row(bias), row(scale), row(shift), eps))[0]
        weight, bias = network.weights[-1].to(dtype), network.biases[-1].to(dtype)
        x = torch.baddbmm(row(bias), x, weight.mT) if stacked else torch.nn.functional.linear(x, weight, bias)
        return x.to(z.dtype) if method == "map" else centered(x.to(z.dtype), group)

    dt = 1 / substeps

    def step(z: Tensor, given: Tensor | None) -> Tensor:
        if method == "map":
            return velocity(z, given, 0)
        for k in range(substeps):
            k1 = velocity(z, given, k)
            z = z + dt * k1 if method == "euler" else z + (0.5 * dt) * (k1 + velocity(z + dt * k1, given, k + 1))
        return z

    if rows is None or rows.ndim == z.ndim:
        return step(z, rows)
    states = []
    for given in rows.unbind(0):
        states.append(z := step(z, given))
    return torch.stack(states)


def check(call: Call) -> None:
    """Check everything that the implementations rely on."""
    one_of("method", call.method, METHODS)
    whole("substeps", call.substeps, 1)
    one_of("keep", call.keep, (NOTHING, FROZEN, TRAINED))
    at_least("eps", call.eps, 0)
    z, rows, weights = call.z, call.rows, call.weights
    hidden = len(weights) - 1
    if hidden < 1 or len(call.biases) != hidden or len(call.scales) != hidden or len(call.shifts) != hidden:
        counts = ", ".join(f"{len(part)} {name}" for name, part in zip(VelocityMLP._fields, call[3:7]))
        raise ValueError(f"the network has {counts}; give n + 1 weights with n of the others, n at least 1")
    if any(w.ndim not in (2, 3) or w.ndim != weights[0].ndim for w in weights):
        raise ValueError(f"the weights have {', '.join(str(w.ndim) for w in weights)} axes; give 2, or 3 for several networks")
    stacked = call.stacked
    if z.ndim != 2 + stacked or z.dtype not in DTYPES:
        raise ValueError(f"z is {z.dtype} {tuple(z.shape)}; give {'[S, B, D]' if stacked else '[B, D]'}, float32 or float64")
    if rows is not None and rows.ndim not in (z.ndim, z.ndim + 1):
        raise ValueError(f"rows has {rows.ndim} axes and z {z.ndim}; give as many, or one more for several steps")
    steps = () if call.steps is None else (call.steps,)
    sets, (batch, width), sizes = z.shape[:-2], z.shape[-2:], [w.shape[-2] for w in weights]
    check_group("group", call.group, sizes[-1])
    if call.method == "map" and (call.substeps != 1 or call.group):
        raise ValueError(f"substeps is {call.substeps} and group {call.group}; with method='map' give 1 and 0")
    if steps == (0,):
        raise ValueError("rows has no step; give at least one")
    given = [call.times, *weights, *call.biases, *call.scales, *call.shifts]
    shapes: list[tuple[int, ...]] = [(call.substeps + (call.method == "heun"), sizes[0]), *zip(sizes, [width, *sizes])]
    shapes += [(size,) for size in [*sizes[1:], *sizes[:-1], *sizes[:-1]]]
    if sets:
        shapes = [(*sets, *shape) for shape in shapes]
    if rows is not None:
        given.append(rows)
        shapes.append((*steps, *sets, batch, sizes[0]))
    for t, shape in zip(given, shapes):
        if t.shape != shape or t.dtype != z.dtype or t.device != z.device:
            name = _name(call, t)
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}; with z {z.dtype} {tuple(z.shape)} on {z.device} "
                f"and widths {sizes[:-1]} it must be {z.dtype} {shape}"
            )
    if (call.method != "map" or steps) and sizes[-1] != width:
        raise ValueError(f"z has {width} entries in its last axis and weights[{hidden}] gives {sizes[-1]}; give as many")


def _name(call: Call, tensor: Tensor) -> str:
    """Return the name of an argument."""
    if tensor is call.rows or tensor is call.times:
        return "rows" if tensor is call.rows else "times"
    return next(f"{name}[{i}]" for name, part in zip(VelocityMLP._fields, call[3:7]) for i, t in enumerate(part) if t is tensor)


def _run_with(pieces: Pieces) -> Any:
    def run(call: Call) -> tuple[Tensor, list[Tensor]]:
        if pieces is CPU and small.is_small(call):
            kept = buffers(call).flat() if call.keep != NOTHING else []
            return small.forward(call, small.problem(call, native.addresses(*kept))), kept
        forward = Forward(call, pieces)
        result = forward.run()
        return result, forward.kept.flat() if call.keep != NOTHING else []

    return run


def _contiguous(call: Call) -> Reason:
    """Tell whether tensors are contiguous: z and rows as a whole, parameters other than weights in every set."""
    for name in ("z", "rows", "times", "biases", "scales", "shifts"):
        value = getattr(call, name)
        for t in value if isinstance(value, list) else [value]:
            if t is not None and not (t[:1] if call.stacked and name not in ("z", "rows") else t).is_contiguous():
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
    held = Kept.of(kept, len(call.scales))
    if pieces is CPU and small.is_small(call):
        tensors = [*call[:3], *(t for part in call[3:7] for t in part)]
        gradients = small.backward(small.problem(call, native.addresses(*kept)), grad.contiguous(), tensors, call.keep)
        return _result(gradients, call)
    return Backward(call, held, pieces).run(grad.contiguous())


def _result(found: Sequence[Tensor | None], call: Call) -> Result:
    """Return gradients of all tensors one by one, None where unwanted, as the operation's."""
    none = call.z.new_empty(0)
    z, rows, times, *parts = grouped(found, len(call.scales))
    if call.keep != TRAINED:
        return Result(z, none if rows is None else rows, none, [], [], [], [])
    return Result(z, none if rows is None else rows, times, *parts)


def _empty(call: Call) -> tuple[Tensor, list[Tensor]]:
    return call.empty(), buffers(call).flat() if call.keep != NOTHING else []


def _fake_backward(grad: Tensor, *args: Any) -> Result:
    call, none = Call(*args[:-2]), grad.new_empty(0)
    rows = none if call.rows is None else call.rows.new_empty(call.rows.shape)
    if call.keep != TRAINED:
        return Result(call.z.new_empty(call.z.shape), rows, none, [], [], [], [])
    parts = [[t.new_empty(t.shape) for t in part] for part in call[3:7]]
    return Result(call.z.new_empty(call.z.shape), rows, call.times.new_empty(call.times.shape), *parts)


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


def grouped(flat: Sequence[Any], hidden: int) -> list[Any]:
    """Return an entry for each tensor, grouped as in the operation's arguments: z, rows, times, and the four lists of parameters."""
    parts, rest = list(flat[:3]), list(flat[3:])
    for count in (hidden + 1, hidden, hidden, hidden):
        parts.append(rest[:count])
        rest = rest[count:]
    return parts


def _gradients(ctx: Any, grad: Tensor | None, run: Callable[..., Any]) -> list[Tensor | None]:
    """Return the gradient of each tensor argument, in their order, the lists' one by one; ``run`` computes the backward pass."""
    count = 4 + 4 * ctx.hidden
    *options, keep, backend = ctx.options
    if grad is None:
        return [None] * count
    saved = list(ctx.saved_tensors)
    tensors, kept = saved[:count], saved[count:]
    if transforms.watched([grad]):
        call = lambda *places: _definition(Call._make([*grouped(places, ctx.hidden), *options, keep]))  # noqa: E731
        return transforms.gradients(call, tensors, [grad])
    found = Result(*run(grad, *grouped(tensors, ctx.hidden), *options, keep, kept, backend))
    first = [found.z, None if tensors[1] is None else found.rows]
    if keep != TRAINED:
        return [*first, *[None] * (count - 2)]
    return [*first, found.times, *found.weights, *found.biases, *found.scales, *found.shifts]


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    return (*grouped(_gradients(ctx, grad, torch.ops.ttcfast.mlp_flow_backward), ctx.hidden), *[None] * 7)


def is_native(call: Call, backend: str = "auto") -> bool:
    """Tell whether the C++ loop runs the call."""
    return small.is_small(call) and choose("mlp_flow", BACKENDS, backend, call).name == "cpu"


class _Immediate(torch.autograd.Function):
    """The operation without torch's dispatcher, which costs more than a small network's arithmetic.

    Arguments are the operation's, the lists one by one, and the number of hidden layers.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *flat, ctx.hidden = args
        count = 4 + 4 * ctx.hidden
        ctx.options, ctx.held = flat[count:], None
        call = Call._make([*grouped(flat[:count], ctx.hidden), *ctx.options[:-1]])
        check(call)
        kept: list[Tensor] = []
        if is_native(call, ctx.options[-1]):
            ctx.held = small.hold(call)
            result = small.forward(call, ctx.held.problem)
        else:
            result, kept = _run(*call, ctx.options[-1])
        ctx.save_for_backward(*flat[:count], *kept)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.held is None or transforms.watched(grads):
            return (*_gradients(ctx, grads[0], _run_backward), *[None] * 8)
        tensors = ctx.saved_tensors
        problem = ctx.held.again(tensors, lambda: Call._make([*grouped(tensors, ctx.hidden), *ctx.options[:-1]]))
        return (*small.backward(problem, grads[0].contiguous(), tensors, ctx.options[-2]), *[None] * 8)


def _definition(call: Call) -> tuple[Tensor, list[Tensor]]:
    options = (call.method, call.substeps, call.group, call.eps, call.matmul_dtype)
    return mlp_flow_ref(call.z, call.rows, call.times, VelocityMLP(*call[3:7]), *options), []


def _mixed(op: Callable[..., tuple[Tensor, list[Tensor]]], *args: Any) -> tuple[Tensor, list[Tensor]]:
    """The autocast policy: state and parameters in float32, products in bfloat16 if that is autocast's dtype."""
    call = Call(*args[:-1])
    dtype = transforms.wider(call.z, *call.weights)
    z, rows, times = (None if t is None else t.to(dtype) for t in call[:3])
    parts = ([t.to(dtype) for t in part] for part in call[3:7])
    half = call.half or (dtype == torch.float32 and torch.get_autocast_dtype(call.z.device.type) == torch.bfloat16)
    return op(z, rows, times, *parts, call.method, call.substeps, call.group, call.eps, half, call.keep, args[-1])


_run = define_call(
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
