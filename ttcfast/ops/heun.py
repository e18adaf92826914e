"""The vector updates of Heun's and Euler's method, each in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttcfast.checks import whole

from . import native, transforms
from .arguments import dense
from .define import LIBRARY, define, invoke
from .registry import Backend, Reason, choose, contiguous, cpu_device, register, triton_available, triton_device, yes

DTYPES = (torch.float32, torch.float64)


def heun_predict(z: Tensor, k1: Tensor, dt: float, *, group: int = 0, backend: str = "auto") -> Tensor:
    """Euler update ``z + dt k1``: the predictor of Heun's method, and the whole of Euler's.

    Args:
        z: State at the start of the substep, ``[..., D]``, float32 or float64.
        k1: Velocity at ``(z, t)``, ``[..., D]``, in the dtype of ``z``, or bfloat16 if ``z`` is float32.
        dt: Substep, in the time unit of the velocity.
        group: Size of groups of consecutive entries, a divisor of D. The mean of each group is subtracted from ``k1`` first, which
            preserves the groups' sums in ``z`` (latents on products of simplices); 0 leaves ``k1`` unchanged.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``. C++ and Triton read contiguous tensors; "auto" gives strided ones,
            and bfloat16 ones on the CPU, to the reference.

    Returns:
        Shape and dtype of ``z``. Differentiable in the tensors, any number of times and in forward mode; ``torch.func`` and
        ``torch.vmap`` evaluate its definition. Under ``torch.autocast`` 16-bit tensors are widened to float32, the result's dtype.
        NaN and infinities propagate. With ``group`` 0 all backends give the same bits.
        On the CPU a call costs about 10 us of host time: without groups, ``z + dt * k1`` is faster below about 10^5 entries.

    Raises:
        ValueError: Shapes, dtypes or devices differ, ``group`` does not divide D, or ``dt`` is a tensor that requires a gradient.
        BackendError: The requested backend cannot run; the message says why.

    Source: Flow plan, "ODE Integrator Choice and Justification"; docs/design/decisions.md ("Integrators").
    """
    dense(z=z, k1=k1)
    transforms.constant("dt", dt)
    result: Tensor = invoke("heun_predict", z, k1, dt, group, backend)
    return result


def heun_correct(z: Tensor, k1: Tensor, k2: Tensor, dt: float, *, group: int = 0, backend: str = "auto") -> Tensor:
    """Trapezoidal update ``z + dt/2 (k1 + k2)`` of Heun's method.

    Args:
        z: State at the start of the substep, ``[..., D]``, float32 or float64.
        k1: Velocity at ``(z, t)``, as for :func:`heun_predict`.
        k2: Velocity at ``(z + dt k1, t + dt)``, shape and dtype of ``k1``.
        dt: Substep, in the time unit of the velocity.
        group: As for :func:`heun_predict`, for the sum of both velocities.
        backend: As for :func:`heun_predict`.

    Returns:
        State at the end of the substep, shape and dtype of ``z``; as for :func:`heun_predict`. Moves 4 tensors through memory; the plain
        expression moves 9.

    Raises:
        ValueError: As for :func:`heun_predict`.
        BackendError: The requested backend cannot run; the message says why.

    Source: Flow plan, "ODE Integrator Choice and Justification" (explicit trapezoidal rule).
    """
    dense(z=z, k1=k1, k2=k2)
    transforms.constant("dt", dt)
    result: Tensor = invoke("heun_correct", z, k1, k2, dt, group, backend)
    return result


def check(z: Tensor, slopes: Sequence[Tensor], group: int) -> None:
    """Check everything that the implementations rely on."""
    if z.dtype not in DTYPES:
        raise ValueError(f"z is {z.dtype}; give float32 or float64")
    wanted = (z.dtype, torch.bfloat16) if z.dtype == torch.float32 else (z.dtype,)
    for name, k in zip(("k1", "k2"), slopes):
        if k.shape != z.shape or k.device != z.device or k.dtype not in wanted:
            raise ValueError(f"{name} is {k.dtype} {tuple(k.shape)} on {k.device}; z is {z.dtype} {tuple(z.shape)} on {z.device}")
    if slopes[0].dtype != slopes[-1].dtype:
        raise ValueError(f"the slopes are {' and '.join(str(k.dtype) for k in slopes)}; give both in one dtype")
    check_group("group", group, z.shape[-1] if z.ndim else 0)


def check_group(name: str, group: int, width: int) -> None:
    """Raise ``ValueError`` unless ``group`` is 0 or divides ``width``."""
    whole(name, group, 0)
    if group and (width == 0 or width % group):
        raise ValueError(f"{name} is {group}, which does not divide the last size, {width}; give a divisor, or 0 for none")


def centered(k: Tensor, group: int) -> Tensor:
    """Return ``k`` minus the mean of every ``group`` consecutive entries; ``k`` itself if ``group`` is 0."""
    if not group:
        return k
    grouped = k.reshape(*k.shape[:-1], k.shape[-1] // group, group)
    return (grouped - grouped.mean(-1, keepdim=True)).reshape(k.shape)


def heun_ref(base: Tensor | None, first: Tensor, second: Tensor | None, step: float, ratio: float, group: int) -> Tensor:
    """Return ``base + step * center(first + ratio * second)``: both updates and those of their backward passes."""
    dtype = first.dtype if base is None else base.dtype
    slope = first.to(dtype)
    if second is not None:
        slope = slope + (second.to(dtype) if ratio == 1 else ratio * second.to(dtype))
    change = step * centered(slope, group)
    return change if base is None else base + change


def update(
    base: Tensor | None, first: Tensor, second: Tensor | None, step: float, ratio: float, group: int, backend: str = "auto"
) -> Tensor:
    """Run :func:`heun_ref` on one of the backends, unchecked."""
    out = torch.empty_like(first, dtype=first.dtype if base is None else base.dtype)
    choose("heun", BACKENDS, backend, base, first, second).run(base, first, second, step, ratio, group, out)
    return out


# Each fills ``out``, which may be ``base``; the fused loop of mlp_flow calls them too.


def fill_reference(base: Tensor | None, first: Tensor, second: Tensor | None, step: float, ratio: float, group: int, out: Tensor) -> None:
    out.copy_(heun_ref(base, first, second, step, ratio, group))


def fill_cpu(base: Tensor | None, first: Tensor, second: Tensor | None, step: float, ratio: float, group: int, out: Tensor) -> None:
    native.module().heun(
        native.code(first.dtype),
        first.numel(),
        *native.addresses(base, first, second),
        step,
        ratio,
        group,
        out.data_ptr(),
        *native.threads_and_level(),
    )


def fill_triton(base: Tensor | None, first: Tensor, second: Tensor | None, step: float, ratio: float, group: int, out: Tensor) -> None:
    from ttcfast.kernels import heun as kernels

    kernels.launch(base, first, second, step, ratio, group, out)


def _cpu_supports(base: Tensor | None, first: Tensor, second: Tensor | None) -> Reason:
    for t in (base, first, second):
        if t is not None and (t.dtype != first.dtype or t.dtype not in DTYPES):
            dtypes = ", ".join(str(t.dtype) for t in (base, first, second) if t is not None)
            return cpu_device(base, first, second) or f"the tensors are {dtypes}; the C++ path takes float32 or float64"
    return cpu_device(base, first, second) or contiguous(base, first, second)


def _triton_supports(base: Tensor | None, first: Tensor, second: Tensor | None) -> Reason:
    return triton_device(first.device.type) or contiguous(base, first, second)


BACKENDS = register(
    "heun",
    Backend("cpu", native.available, _cpu_supports, fill_cpu),
    Backend("triton", triton_available, _triton_supports, fill_triton),
    Backend("reference", yes, yes, fill_reference),
)


def _arguments(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor | None, float, float, int]:
    """Return the arguments of :func:`heun_ref` from those of either operation, checked."""
    *slopes, dt, group = rest
    check(z, slopes, group)
    return (z, slopes[0], None, dt, 1.0, group) if len(slopes) == 1 else (z, *slopes, 0.5 * dt, 1.0, group)


def _run(*args: Any) -> Tensor:
    return update(*_arguments(*args[:-1]), args[-1])


def _fake(*args: Any) -> Tensor:
    return torch.empty_like(_arguments(*args[:-1])[0])


def _definition(*args: Any) -> Tensor:
    return heun_ref(*_arguments(*args))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *slopes, dt, ctx.group, _ = inputs
    ctx.slopes, ctx.slope_dtype, ctx.step = len(slopes), slopes[0].dtype, dt / len(slopes)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    share = (ctx.step * centered(grad, ctx.group)).to(ctx.slope_dtype)
    return (grad, *[share] * ctx.slopes, None, None, None)


def _in_float32(op: Callable[..., Tensor], *args: Any) -> Tensor:
    tensors = [x for x in args if isinstance(x, Tensor)]
    dtype = transforms.wider(tensors[0])
    return op(*(t.to(dtype) for t in tensors), *args[len(tensors) :])


for _name, _slopes in (("heun_predict", "Tensor k1"), ("heun_correct", "Tensor k1, Tensor k2")):
    define(f"{_name}(Tensor z, {_slopes}, float dt, int group, str backend) -> Tensor", _run, _fake)
    transforms.register(LIBRARY, _name, _definition, backward=_backward, setup_context=_setup, policy=_in_float32)
