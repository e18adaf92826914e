"""What the analytical rewards of a gas and of declared fields share: checks and conversions of arguments, and derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from ttcfast.spec import Momentum, Scale

from . import transforms
from .arm_fields_ref import FieldCall
from .arm_ref import Call

AnyCall = TypeVar("AnyCall", Call, FieldCall)
MOMENTA, SCALES = get_args(Momentum), get_args(Scale)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def split(given: float | Tensor | None, default: float) -> tuple[Tensor | None, float]:
    """Split a parameter into (tensor or None, number)."""
    if isinstance(given, Tensor):
        return given, default
    return None, default if given is None else float(given)


def changes_of(
    quantities: Mapping[str, tuple[int, ...]], expected: Mapping[str, float | Tensor] | None, state: Tensor, rows: int
) -> Tensor | None:
    """Return the expected changes of integrals as float64 ``[N, rows]``, None if none is given.

    Args:
        quantities: Rows of each conserved quantity.
        expected: By quantity a number, ``[N]``, or ``[N, components]``.
        state: States ``[N, C, *S]``.
        rows: Number of integrals.

    Raises:
        ValueError: A name is not a conserved quantity, or a tensor has another shape, including ``[N]`` for several components.
    """
    if not expected:
        return None
    out = torch.zeros((len(state), rows), dtype=torch.float64, device=state.device)
    for name, change in expected.items():
        transforms.constant(f"expected change of {name}", change)
        if name not in quantities:
            raise ValueError(f"expected names {name!r}, which is no conserved quantity; they are {', '.join(quantities) or 'none'}")
        places, want = quantities[name], (len(state), len(quantities[name]))
        if not isinstance(change, Tensor):
            for place in places:
                out[:, place].fill_(float(change))
            continue
        given = change.to(state.device, torch.float64)
        if tuple(given.shape) not in ((), want) and (len(places) > 1 or tuple(given.shape) != want[:1]):
            raise ValueError(f"expected change of {name!r} has shape {tuple(given.shape)}; give a number or {list(want)}")
        for place, column in zip(places, given.expand(want).unbind(1) if given.ndim != 1 else [given]):
            out[:, place] = column
    return out


def check_states(state: Tensor, candidates: Tensor) -> None:
    """Raise ``ValueError`` unless states ``[N, C, *S]`` and candidates ``[N, B, C, *S]`` go together."""
    if (candidates.dtype, candidates.device) != (state.dtype, state.device):
        raise ValueError(
            f"candidates are {candidates.dtype} on {candidates.device} and state is {state.dtype} on {state.device}; "
            "give both in one dtype on one device"
        )
    if state.dtype not in DTYPES:
        raise ValueError(f"state is {state.dtype}; give float32, float64 or bfloat16")
    if not 3 <= state.ndim <= 5:
        raise ValueError(f"state has shape {tuple(state.shape)}; expected [N, C, *S] with 1 to 3 space axes")
    if candidates.ndim != state.ndim + 1 or candidates.shape[:1] + candidates.shape[2:] != state.shape:
        raise ValueError(
            f"candidates have shape {tuple(candidates.shape)} and state {tuple(state.shape)}; expected [N, B, C, *S] and [N, C, *S] "
            "with the same N, C and *S"
        )
    if candidates.shape[1] == 0:
        raise ValueError(f"candidates have shape {tuple(candidates.shape)}, so B = 0; give at least one candidate per problem")
    if 0 in state.shape[1:]:
        raise ValueError(f"state has shape {tuple(state.shape)}; it needs at least one channel and one cell")


def check_fields(state: Tensor, volumes: Tensor | None, mask: Tensor | None, values: Tensor | None, **others: Tensor | None) -> None:
    """Raise ``ValueError`` unless cell volumes, boundary mask and boundary values have the state's device and grid."""
    if volumes is mask is values is None and not any(tensor is not None for tensor in others.values()):
        return
    space = tuple(state.shape[2:])
    for name, tensor in {"cell_volume": volumes, "boundary_mask": mask, "boundary_value": values, **others}.items():
        if tensor is not None and tensor.device != state.device:
            raise ValueError(f"{name} is on {tensor.device} and state on {state.device}; move it with spec.replace({name}=...)")
    if volumes is not None and tuple(volumes.shape) not in ((), space):
        raise ValueError(f"cell_volume has shape {tuple(volumes.shape)}; give a number or one value per cell, {space}")
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != space):
        raise ValueError(f"boundary_mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {space}, the space axes of state")
    if values is not None:
        want, given = tuple(state.shape[1:]), tuple(values.shape)
        if len(given) > len(want) or any(g not in (1, w) for g, w in zip(reversed(given), reversed(want))):
            raise ValueError(f"boundary_value has shape {given}; it must broadcast to [C, *S] = {want}")


def small_fields(call: Call | FieldCall) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return contiguous cell volumes, mask and boundary values in the accumulation dtype; all small compared to the candidates."""
    dtype = call.accumulator
    volumes = None if call.volumes is None else call.volumes.to(dtype).expand(call.space).contiguous()
    values = None if call.mask is None or call.values is None else call.values.to(dtype).expand(call.state.shape[1:]).contiguous()
    return volumes, None if call.mask is None else call.mask.contiguous(), values


def pad_sizes(x: Tensor, lead: int) -> list[int]:
    """Return leading sizes and exactly three space sizes, padded by 1 on the left."""
    return [*x.shape[:lead], *[1] * (3 + lead - x.ndim), *x.shape[lead:]]


def pad_strides(x: Tensor, lead: int) -> list[int]:
    """Return leading strides and exactly three space strides, padded by 0 on the left."""
    return [*x.stride()[:lead], *[0] * (3 + lead - x.ndim), *x.stride()[lead:]]


def in_float32(op: Callable[..., tuple[Tensor, ...]], state: Tensor, candidates: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The autocast policy: keeps two tensors of one supported dtype as they are, and widens them otherwise."""
    if state.dtype == candidates.dtype and state.dtype in DTYPES:
        return op(state, candidates, *rest)
    dtype = transforms.wider(state, candidates)
    return op(state.to(dtype), candidates.to(dtype), *rest)


def keep(ctx: Any, call: Call | FieldCall, *outputs: Tensor) -> None:
    """Keep a call and some of its outputs for the backward pass, which ``kept`` returns."""
    ctx.call = [None if isinstance(x, Tensor) else x for x in call]
    ctx.tensor_at = [i for i, x in enumerate(call) if isinstance(x, Tensor)]
    ctx.save_for_backward(*outputs, *(x for x in call if isinstance(x, Tensor)))


def kept(ctx: Any, kind: type[AnyCall]) -> tuple[AnyCall, tuple[Tensor, ...]]:
    """Return the call, of this class, and the outputs."""
    count, flat = len(ctx.saved_tensors) - len(ctx.tensor_at), list(ctx.call)
    for i, x in zip(ctx.tensor_at, ctx.saved_tensors[count:]):
        flat[i] = x
    return kind(*flat), ctx.saved_tensors[:count]


def in_candidates(reference: Callable[[AnyCall], tuple[Tensor, ...]], given: AnyCall, count: int) -> tuple[Tensor, ...]:
    """The reference, its first ``count`` outputs differentiable in the candidates only, with gradient 0 where the score is -inf."""
    constants: list[Any] = [x.detach() if isinstance(x, Tensor) else x for x in given]
    call = type(given)(*constants)
    fixed: tuple[Tensor, ...] = reference(call)
    alive = fixed[0].isfinite()

    def living(x: Tensor, constant: Tensor) -> Tensor:
        return torch.where(alive.reshape(*alive.shape, *[1] * (x.ndim - 2)), x, constant)

    found: tuple[Tensor, ...] = reference(call._replace(candidates=living(given.candidates, call.candidates)))
    return (*map(living, found[:count], fixed), *fixed[count:])
