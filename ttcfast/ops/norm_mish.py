"""Applies bias, LayerNorm and Mish between two matrix products of the world models' networks in one pass, and their gradient in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttcfast.checks import at_least

from . import native, transforms
from .arguments import dense
from .define import LIBRARY, arguments, define, define_call, invoke
from .registry import Backend, Reason, choose, contiguous, cpu_device, register, triton_available, triton_device, yes

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
EPS = 1e-5


class Layer(NamedTuple):
    """Parameters of the steps after one matrix product, ``[D]`` each."""

    bias: Tensor
    scale: Tensor
    shift: Tensor
    eps: float


class Gradients(NamedTuple):
    """Buffers that the backward pass fills; None for unwanted ones."""

    x: Tensor  # [..., D], gradient of x and rows; summed over rows, also of bias
    y: Tensor | None = None  # [..., D], the forward result, recomputed
    scale: Tensor | None = None  # [D]
    shift: Tensor | None = None  # [D]; both or neither


def norm_mish(
    x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *, rows: Tensor | None = None, eps: float = EPS, backend: str = "auto"
) -> Tensor:
    """Return ``mish(LayerNorm(x + rows + bias) * scale + shift)``, normalised over the last axis.

    Args:
        x: Matrix product without its bias, ``[..., D]``, float32, float64 or bfloat16.
        bias: ``[D]``; like ``scale`` and ``shift`` in the dtype of ``x``, or float32 if ``x`` is bfloat16.
        scale: LayerNorm's weight, ``[D]``.
        shift: LayerNorm's bias, ``[D]``.
        rows: Added to ``x`` row by row, ``[..., D]`` in the dtype of ``bias``: the part of the product that several calls share. None: 0.
        eps: Added to the variance.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``. C++ and Triton read contiguous tensors; "auto" passes strided ones,
            and bfloat16 ones on the CPU, to the reference.

    Returns:
        ``[..., D]`` in the dtype of ``x``; statistics and activation are computed in the dtype of ``bias``. Differentiable in every
        tensor, saving ``x``, ``rows`` and two numbers per row. Second derivatives, forward mode, ``torch.func`` and ``torch.vmap``
        evaluate its definition. Under ``torch.autocast`` ``x`` and the result keep their dtype, and everything else is converted to
        float32 (float64 with float64 ``x``). Rows with NaN or infinity become NaN and do not affect other rows.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or ``eps`` is negative or a tensor that requires a gradient.
        BackendError: The requested backend cannot run; the message says why.
    """
    dense(x=x, bias=bias, scale=scale, shift=shift)
    if rows is not None:
        dense(rows=rows)
    transforms.constant("eps", eps)
    result: Tensor = invoke("norm_mish", x, rows, bias, scale, shift, eps, backend)[0]
    return result


class Call(NamedTuple):
    x: Tensor  # [..., D]
    rows: Tensor | None  # [..., D]
    bias: Tensor  # [D], like the next two
    scale: Tensor
    shift: Tensor
    eps: float

    @property
    def layer(self) -> Layer:
        return Layer(self.bias, self.scale, self.shift, self.eps)

    def empty(self) -> tuple[Tensor, Tensor]:
        """Allocate the result and its statistics."""
        return torch.empty_like(self.x), self.scale.new_empty((*self.x.shape[:-1], 2))


def check(call: Call) -> None:
    """Check everything that the implementations rely on."""
    x = call.x
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; give float32, float64 or bfloat16")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; give [..., D] with D at least 1")
    wanted = accumulator(x)
    for name in ("bias", "scale", "shift", "rows"):
        t, shape = getattr(call, name), x.shape if name == "rows" else x.shape[-1:]
        if t is not None and (t.shape != shape or t.dtype != wanted or t.device != x.device):
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}; x is {x.dtype} {tuple(x.shape)} on {x.device}, "
                f"so give {wanted} {tuple(shape)}"
            )
    at_least("eps", call.eps, 0)


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype of statistics and parameters for ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def norm_mish_ref(x: Tensor, rows: Tensor | None, layer: Layer) -> tuple[Tensor, Tensor]:
    """Return the result, and mean and reciprocal standard deviation per row, ``[..., 2]``."""
    total = _total(x, rows, layer)
    mean = total.mean(-1, keepdim=True)
    rstd = ((total - mean).square().mean(-1, keepdim=True) + layer.eps).rsqrt()
    y = torch.nn.functional.mish((total - mean) * rstd * layer.scale + layer.shift)
    return y.to(x.dtype), torch.cat([mean, rstd], -1)


def _total(x: Tensor, rows: Tensor | None, layer: Layer) -> Tensor:
    total = x.to(layer.bias.dtype) + layer.bias
    return total if rows is None else total + rows


# Each pair fills ``y`` and ``stats``, and ``out``; the fused loop of mlp_flow calls them too.


def fill_reference(x: Tensor, rows: Tensor | None, layer: Layer, y: Tensor, stats: Tensor) -> None:
    result = norm_mish_ref(x, rows, layer)
    y.copy_(result[0])
    stats.copy_(result[1])


def fill_backward_reference(grad: Tensor, x: Tensor, rows: Tensor | None, layer: Layer, stats: Tensor, out: Gradients) -> None:
    mean, rstd = stats[..., :1], stats[..., 1:]
    hat = (_total(x, rows, layer) - mean) * rstd
    normal = hat * layer.scale + layer.shift
    inner = torch.ops.aten.mish_backward(grad.to(normal.dtype), normal)
    outer = inner * layer.scale
    out.x.copy_(rstd * (outer - outer.mean(-1, keepdim=True) - hat * (outer * hat).mean(-1, keepdim=True)))
    if out.y is not None:
        out.y.copy_(torch.nn.functional.mish(normal))
    if out.scale is not None and out.shift is not None:
        out.scale.copy_((inner * hat).reshape(-1, x.shape[-1]).sum(0))
        out.shift.copy_(inner.reshape(-1, x.shape[-1]).sum(0))


def _native_call(x: Tensor, rows: Tensor | None, layer: Layer) -> tuple[Any, ...]:
    """Return the leading arguments of both native functions."""
    width = x.shape[-1]
    pointers = native.addresses(x, rows, *layer[:3])
    return native.code(x.dtype), x.numel() // width, width, pointers, layer.eps, *native.threads_and_level()


def fill_cpu(x: Tensor, rows: Tensor | None, layer: Layer, y: Tensor, stats: Tensor) -> None:
    native.module().norm_mish(*_native_call(x, rows, layer), y.data_ptr(), stats.data_ptr())


def fill_backward_cpu(grad: Tensor, x: Tensor, rows: Tensor | None, layer: Layer, stats: Tensor, out: Gradients) -> None:
    native.module().norm_mish_backward(*_native_call(x, rows, layer), grad.data_ptr(), stats.data_ptr(), native.addresses(*out))


def fill_triton(x: Tensor, rows: Tensor | None, layer: Layer, y: Tensor, stats: Tensor) -> None:
    from ttcfast.kernels import norm_mish as kernels

    kernels.launch(x, rows, *layer, y, stats)


def fill_backward_triton(grad: Tensor, x: Tensor, rows: Tensor | None, layer: Layer, stats: Tensor, out: Gradients) -> None:
    from ttcfast.kernels import norm_mish as kernels

    kernels.launch_backward(grad, x, rows, *layer[:3], stats, *out)


_BACKWARD = {"reference": fill_backward_reference, "cpu": fill_backward_cpu, "triton": fill_backward_triton}


def _cpu_supports(call: Call) -> Reason:
    if call.x.dtype == torch.bfloat16:
        return cpu_device(*call[:5]) or "x is torch.bfloat16; the C++ path takes float32 or float64"
    return cpu_device(*call[:5]) or contiguous(*call[:5])


def _triton_supports(call: Call) -> Reason:
    return triton_device(call.x.device.type) or contiguous(*call[:5])


def _filled_by(fill: Callable[..., None]) -> Callable[[Call], tuple[Tensor, Tensor]]:
    def run(call: Call) -> tuple[Tensor, Tensor]:
        out = call.empty()
        fill(call.x, call.rows, call.layer, *out)
        return out

    return run


BACKENDS = register(
    "norm_mish",
    Backend("cpu", native.available, _cpu_supports, _filled_by(fill_cpu)),
    Backend("triton", triton_available, _triton_supports, _filled_by(fill_triton)),
    Backend("reference", yes, yes, _filled_by(fill_reference)),
)


def _run_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, stats, parameters, backend = args
    call = Call(*given)
    chosen = choose("norm_mish", BACKENDS, backend, call)
    found = _fake_backward(grad, *args)
    wanted = Gradients(found[0], None, *(found[1:] if parameters else (None, None)))
    _BACKWARD[chosen.name](grad.contiguous(), call.x, call.rows, call.layer, stats, wanted)
    return found


def _fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients of x, scale and shift; the last two are empty if unwanted."""
    x, scale, parameters = args[0], args[3], args[7]
    shape = scale.shape if parameters else (0,)
    return torch.empty_like(x), scale.new_empty(shape), scale.new_empty(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, rows, bias, scale, shift, ctx.eps, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, rows, bias, scale, shift, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    *tensors, stats = ctx.saved_tensors
    if transforms.watched([grad]):
        return (*transforms.gradients(lambda *places: _definition(Call._make([*places, ctx.eps])), tensors, [grad]), None, None)
    x, rows, bias, scale, shift = tensors
    wants_x, wants_rows, wants_bias, wants_scale, wants_shift = ctx.needs_input_grad[:5]
    parameters = wants_scale or wants_shift
    grads = invoke("norm_mish_backward", grad, x, rows, bias, scale, shift, ctx.eps, stats, parameters, ctx.backend)
    return (
        grads[0] if wants_x else None,
        grads[0].to(bias.dtype) if wants_rows else None,
        grads[0].to(bias.dtype).reshape(-1, x.shape[-1]).sum(0) if wants_bias else None,
        grads[1] if wants_scale else None,
        grads[2] if wants_shift else None,
        None,
        None,
    )


def _definition(call: Call) -> tuple[Tensor, Tensor]:
    y, stats = norm_mish_ref(call.x, call.rows, call.layer)
    return y, stats.detach()


def _mixed(op: Callable[..., Any], x: Tensor, rows: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """The autocast policy: keeps 16-bit ``x`` and converts the rest to float32."""
    wide = x.float() if x.dtype == torch.float16 else x
    dtype = accumulator(wide)
    y, stats = op(wide, None if rows is None else rows.to(dtype), *(t.to(dtype) for t in rest[:3]), *rest[3:])
    return y.to(x.dtype), stats


define_call(
    "norm_mish",
    Call,
    "(Tensor, Tensor)",
    check=check,
    backends=BACKENDS,
    empty=Call.empty,
    definition=_definition,
    backward=_backward,
    setup_context=_setup,
    policy=_mixed,
)
define(
    f"norm_mish_backward(Tensor grad, {arguments(Call)}, Tensor stats, bool parameters, str backend) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_refused = transforms.refuse("norm_mish_backward")
transforms.register(LIBRARY, "norm_mish_backward", _refused, backward=_refused)
