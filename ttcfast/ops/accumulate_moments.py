"""Accumulates running sums and the squared norm of many gradients in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, overlap, transforms
from .arguments import of_type
from .define import LIBRARY, define, invoke
from .registry import Backend, Reason, choose, cpu_device, register, triton_available, triton_device, yes

DTYPES = native.DTYPES


def accumulate_moments(
    grads: Sequence[Tensor], totals: Sequence[Tensor] | None, *, zero_grads: bool = False, backend: str = "auto"
) -> Tensor:
    """Add every gradient to its total and return the sum of all squares: ``totals[i] += grads[i]``, ``sum_i ||grads[i]||^2``.

    Args:
        grads: Gradients, each of any shape; all float32, float64, bfloat16 or float16, on one device.
        totals: Running sums, one per gradient and of its shape, changed in place; in the gradients' dtype, or float32 with 16-bit
            gradients (the better choice: a 16-bit running sum loses small gradients). None computes only the sum of squares.
        zero_grads: Also set every gradient to zero, in the same pass.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"``.

    Returns:
        Sum of the squares of all elements, a float64 scalar on the gradients' device; nothing waits for the device. Squares are formed
        and added in float64, in an order that depends only on the sizes: results are bitwise equal from run to run, for any number of
        threads and any CPU instruction set. Totals are added in their own precision and rounded once, bitwise equal to ``add_``.
        Non-finite gradients show in the result: inf if an element is infinite and none is NaN (or if squares of float64 overflow),
        NaN if any is NaN. They are added to their totals all the same. Not differentiable, and refused under ``torch.func`` and
        ``torch.vmap``. ``torch.autocast`` has no effect.
        Reads each gradient and reads and writes each total once: 12 bytes per float32 parameter, against 16 for ``_foreach_add_``
        followed by ``_foreach_norm``; 4 without totals, 4 more with ``zero_grads``.
        The ``triton`` backend can be captured in a CUDA graph after one call outside the capture, which compiles it.

    Raises:
        ValueError: There is no gradient, lengths or shapes differ, dtypes or devices are mixed, a tensor requires grad, two tensors share
            memory, or a tensor to be written is expanded.
        NotImplementedError: A tensor has a forward-mode tangent, or the call is inside a transform of ``torch.func``.
        BackendError: The requested backend cannot run; the message says why. Only the reference takes tensors with gaps in memory or with
            a memory order that differs from their total's.

    Source: The two sums of ESNR; docs/design/decisions.md ("ESNR").
    """
    of_type("grads", grads, Sequence)
    of_type("totals", totals, Sequence, type(None))
    of_type("zero_grads", zero_grads, bool)
    if totals is not None and len(totals) != len(grads):
        raise ValueError(f"there are {len(totals)} totals and {len(grads)} grads; give one total per gradient, or None")
    for name, tensors in (("grads", grads), ("totals", totals or ())):
        if {*map(type, tensors)} != {Tensor}:
            for i, tensor in enumerate(tensors):
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"{name}[{i}] is {tensor!r}; leave out parameters that have no gradient")
        if {t.layout for t in tensors} - {torch.strided}:
            i = next(i for i, t in enumerate(tensors) if t.layout != torch.strided)
            raise ValueError(f"{name}[{i}] is {tensors[i].layout}; give dense tensors (of an Embedding with sparse=False)")
    if not len(grads):
        raise ValueError("grads is empty; give at least one gradient")
    name = "accumulate_moments.zero_grads" if zero_grads else "accumulate_moments"
    result: Tensor = invoke(name, grads, totals or [], backend)
    return result


def check(grads: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
    """Check everything that the implementations rely on, so that wrong arguments raise instead of corrupting memory.

    Operates on whole lists: with hundreds of tensors, checking each in turn would cost up to a millisecond.
    """
    if not grads or len(totals) not in (0, len(grads)):
        raise ValueError(f"there are {len(totals)} totals and {len(grads)} grads; give one total per gradient, or none")
    device = grads[0].device
    for name, tensors in (("grads", grads), ("totals", totals)):
        if len({t.dtype for t in tensors}) > 1 or {t.device for t in tensors} - {device}:
            i = next(i for i, t in enumerate(tensors) if t.dtype != tensors[0].dtype or t.device != device)
            raise ValueError(
                f"{name}[{i}] is {tensors[i].dtype} on {tensors[i].device}, {name}[0] is {tensors[0].dtype} and grads[0] is on {device}; "
                f"give all {name} in one dtype, and everything on one device"
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            i = next(i for i, t in enumerate(tensors) if t.requires_grad)
            raise ValueError(f"{name}[{i}] requires grad and accumulate_moments is not differentiable; detach it or use torch.no_grad()")
    _check_dtypes(grads[0].dtype, totals[0].dtype if totals else grads[0].dtype)
    if totals and [g.shape for g in grads] != [t.shape for t in totals]:
        i = next(i for i, (g, t) in enumerate(zip(grads, totals)) if g.shape != t.shape)
        raise ValueError(f"totals[{i}] has shape {tuple(totals[i].shape)} and grads[{i}] {tuple(grads[i].shape)}; they must be the same")


def _check_dtypes(grad: torch.dtype, total: torch.dtype) -> None:
    if grad not in DTYPES:
        raise ValueError(f"grads are {grad}; give float32, float64, bfloat16 or float16")
    if total != grad and (total != torch.float32 or grad == torch.float64):
        wanted = "float64" if grad == torch.float64 else "float32" if grad == torch.float32 else f"float32 or {grad}"
        raise ValueError(f"totals are {total} and grads {grad}; give totals of {wanted.replace('torch.', '')}")


def _addresses(grads: Sequence[Tensor], totals: Sequence[Tensor], zero_grads: bool) -> list[int]:
    """Return the addresses of totals, then gradients. Raises if tensors share memory or a written one overlaps itself."""
    tensors = [*totals, *grads]
    found = [t.data_ptr() for t in tensors]

    def name(i: int) -> str:
        return f"totals[{i}]" if i < len(totals) else f"grads[{i - len(totals)}]"

    shared = overlap.shared_pair(tensors, found)
    if shared is not None:
        first, second = shared
        what = "is the same memory as" if found[first] == found[second] else "shares memory with"
        raise ValueError(f"{name(second)} {what} {name(first)}; give each gradient and total once (clone() the second)")
    written = tensors if zero_grads else totals
    if not all(map(Tensor.is_contiguous, written)):
        for i, tensor in enumerate(written):
            if overlap.within_itself(tensor, found[i]):
                raise ValueError(
                    f"{name(i)} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, so several of its elements are one in "
                    "memory, and it is written to; clone() it"
                )
    return found


def accumulate_moments_ref(grads: Sequence[Tensor], totals: Sequence[Tensor], zero_grads: bool, _addresses: object = None) -> Tensor:
    """Compute the definition in torch's own functions."""
    result = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    for grad in grads:
        result += grad.double().square().sum()
    for grad, total in zip(grads, totals):
        total += grad
    if zero_grads:
        for grad in grads:
            grad.zero_()
    return result


def _accumulate_moments_cpu(grads: Sequence[Tensor], totals: Sequence[Tensor], zero_grads: bool, addresses: list[int]) -> Tensor:
    result = native.module().accumulate_moments(
        native.code(grads[0].dtype),
        native.code(totals[0].dtype if totals else grads[0].dtype),
        addresses[len(totals) :],
        addresses[: len(totals)],
        [grad.numel() for grad in grads],
        zero_grads,
        *native.threads_and_level(),
    )
    return torch.tensor(result, dtype=torch.float64)


def _accumulate_moments_triton(grads: Sequence[Tensor], totals: Sequence[Tensor], zero_grads: bool, addresses: list[int]) -> Tensor:
    from ttcfast.kernels import accumulate_moments as kernels

    result: Tensor = kernels.launch(grads, totals, zero_grads, addresses)
    return result


def _packed_alike(grads: Sequence[Tensor], totals: Sequence[Tensor]) -> Reason:
    """Tell whether gradients and totals have no gaps and the same order of elements in memory."""
    if all(map(Tensor.is_contiguous, grads)) and all(map(Tensor.is_contiguous, totals)):
        return None
    for i, (grad, total) in enumerate(zip(grads, totals or grads)):
        if not _packed(grad):
            return f"grads[{i}] has gaps in memory (strides {grad.stride()}, shape {tuple(grad.shape)}); call contiguous() on it"
        if _moving(grad) != _moving(total):
            return f"totals[{i}] lies in memory with strides {total.stride()} and grads[{i}] with {grad.stride()}; they must be the same"
    return None


def _moving(tensor: Tensor) -> list[tuple[int, int]]:
    """Return stride and size of the axes longer than one element."""
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]


def _packed(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(_moving(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


def _cpu_supports(grads: Sequence[Tensor], totals: Sequence[Tensor]) -> Reason:
    return cpu_device(grads[0]) or _packed_alike(grads, totals)


def _triton_supports(grads: Sequence[Tensor], totals: Sequence[Tensor]) -> Reason:
    return triton_device(grads[0].device.type) or _packed_alike(grads, totals)


# The CPU prefers the C++ path, CUDA prefers Triton.
BACKENDS = register(
    "accumulate_moments",
    Backend("cpu", native.available, _cpu_supports, _accumulate_moments_cpu),
    Backend("triton", triton_available, _triton_supports, _accumulate_moments_triton),
    Backend("reference", yes, yes, accumulate_moments_ref),
)


def _run(grads: Sequence[Tensor], totals: Sequence[Tensor], backend: str, zero_grads: bool = False) -> Tensor:
    if transforms.has_tangent([grads, totals]):
        transforms.refuse("accumulate_moments")()
    check(grads, totals)
    addresses = _addresses(grads, totals, zero_grads)
    chosen = choose("accumulate_moments", BACKENDS, backend, grads, totals)
    if chosen.name != "reference":  # raw writes must be reported to autograd, and refused where torch would refuse them
        written = [*totals, *(grads if zero_grads else ())]
        if not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, written)):
            raise RuntimeError("an inference tensor cannot be changed outside torch.inference_mode(); clone() it first")
        for tensor in written:  # older versions of torch accept no list here
            torch.autograd.graph.increment_version(tensor)
    result: Tensor = chosen.run(grads, totals, zero_grads, addresses)
    return result


def _run_and_zero(grads: Sequence[Tensor], totals: Sequence[Tensor], backend: str) -> Tensor:
    return _run(grads, totals, backend, zero_grads=True)


def _fake(grads: Sequence[Tensor], totals: Sequence[Tensor], backend: str) -> Tensor:
    check(grads, totals)
    return torch.empty((), dtype=torch.float64, device=grads[0].device)


# Two overloads, so that each schema states exactly what is written.
define("accumulate_moments(Tensor[] grads, Tensor(a!)[] totals, str backend) -> Tensor", _run, _fake)
define("accumulate_moments.zero_grads(Tensor(a!)[] grads, Tensor(b!)[] totals, str backend) -> Tensor", _run_and_zero, _fake)
for _name in ("accumulate_moments", "accumulate_moments.zero_grads"):
    transforms.register(LIBRARY, _name, transforms.refuse("accumulate_moments"))
