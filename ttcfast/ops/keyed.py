"""The shared part of the keyed random operations: the generator and its normals in pure torch (the definition), the key, the checks.

Every number is a function of (seed, step, site) and (problem, candidate, element) only: the first three determine the key of
Philox 4x32-10, the last three its counter. There is no state, so draws do not depend on order, chunks or devices.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), for Philox; the finaliser is that of SplitMix64
(Steele, Lea, Flood, OOPSLA 2014); docs/design/decisions.md ("Keyed candidates").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ttcfast.spec import Key

from . import define, native
from .arguments import dense
from .registry import Backend, cpu_device, register, triton_available, triton_device, yes

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Run = Callable[[Any], Tensor]
Fill = Callable[[Any, Tensor, Tensor], None]  # of the call, the result and the contiguous rows
MOST_ELEMENTS = 2**34  # of a row: the counter holds element // 4 in 32 bits
LOW = 0xFFFFFFFF
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's step
FINALISER = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_held: ContextVar[Tensor | None] = ContextVar("stream", default=None)


def stream_of(seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the 64 bits that encode (seed, step) in the raw operations, as int64 ``[1]``.

    Changing this tensor's contents gives a compiled model or a captured CUDA graph the noise of another step.

    Args:
        seed: Seed of the run, 0 to 2**63 - 1.
        step: Step of the rollout, 0 to 2**63 - 1.
        device: Device of the operation's rows.

    Raises:
        ValueError: ``seed`` or ``step`` is out of range.
    """
    if torch.compiler.is_compiling():
        # Seed and step stay symbolic, so a new step needs no new graph.
        stream: Tensor = torch.ops.ttcfast.stream(seed, step, torch.device(device))
        return stream
    held = _held.get()
    return _stream(seed, step, torch.device(device)) if held is None else held


@contextmanager
def held_stream(stream: Tensor) -> Iterator[None]:
    """Within the block ``stream_of`` returns ``stream``, whatever seed and step: a CUDA graph that is recorded there reads its contents."""
    token = _held.set(stream)
    try:
        yield
    finally:
        _held.reset(token)


def mixed(seed: int, step: int) -> int:
    """Return output number step + 1 of SplitMix64 started at the hash of the seed, as a signed 64-bit number."""
    return _signed(_finalised(_finalised(seed + GOLDEN) + GOLDEN * (step + 1)))


def philox_key(stream: Tensor, site: int) -> tuple[Tensor, Tensor]:
    """Return low and high 32 bits, int64 ``[1]`` each, of output number site + 1 of SplitMix64 started at ``stream``."""
    z = stream + _signed(GOLDEN * (site + 1))
    for shift, multiplier in FINALISER:
        z = (z ^ _shifted(z, shift)) * _signed(multiplier)
    z = z ^ _shifted(z, 31)
    return z & LOW, _shifted(z, 32)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 on 32-bit words held in int64 tensors that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps around 2**64 with the right bits, and the mask removes the sign bits that the shift fills in.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = _shifted(p1, 32) ^ c1 ^ k0, p1 & LOW, _shifted(p0, 32) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + PHILOX_WEYL[0]) & LOW, (k1 + PHILOX_WEYL[1]) & LOW
    return c0, c1, c2, c3


def words_ref(rows: Tensor, stream: Tensor, site: int, elements: int, antithetic: bool) -> tuple[Tensor, Tensor]:
    """Return the 32-bit integers of each row, int64 ``[M, 4 ceil(elements / 4)]``, and which rows negate another one, ``[M, 1]``."""
    problem, candidate = rows[:, :1], rows[:, 1:]
    opposite = (candidate >= 2) & (candidate % 2 == 0) & antithetic
    candidate = candidate - opposite.to(torch.int64)
    group = torch.arange((elements + 3) // 4, device=rows.device)
    counter = (group & LOW, candidate & LOW, _shifted(candidate, 32), problem & LOW)
    words = torch.stack(philox(counter, philox_key(stream, site)), -1)
    return words.flatten(1), opposite


def uniforms_ref(rows: Tensor, stream: Tensor, site: int, elements: int, antithetic: bool) -> Tensor:
    """Return one 32-bit integer per element, int64 ``[M, elements]``, complemented in rows that negate another one."""
    words, opposite = words_ref(rows, stream, site, elements, antithetic)
    return torch.where(opposite, LOW - words, words)[:, :elements]


def normals_ref(rows: Tensor, stream: Tensor, site: int, elements: int, antithetic: bool) -> Tensor:
    """Return standard normals, float32 ``[M, elements]``: Box-Muller in float64 from the exact integers, rounded last.

    Integers (a, b) give the radius sqrt(-2 ln((a + 1/2) / 2**32)), at most 6.77, and the angle 2 pi (b + 1/2) / 2**32: neither the
    logarithm's argument nor any result is 0. The angle is reduced modulo a quarter turn as an integer, so small sines keep their digits.
    """
    words, opposite = words_ref(rows, stream, site, elements, antithetic)
    a, b = words[:, 0::2], words[:, 1::2]
    radius = torch.sqrt(-2 * torch.log((a.double() + 0.5) * 2.0**-32))
    quarter = (b + 2**29) >> 30
    x = ((b - (quarter << 30)).double() + 0.5) * (2 * math.pi / 2**32)  # within an eighth of a turn
    sine, cosine, odd = torch.sin(x), torch.cos(x), quarter % 2 == 1
    first = torch.where(odd, sine, cosine) * torch.where((quarter + 1) & 2 != 0, -radius, radius)
    second = torch.where(odd, cosine, sine) * torch.where(quarter & 2 != 0, -radius, radius)
    normals = torch.stack([first, second], -1).flatten(1)[:, :elements].float()
    return torch.where(opposite, -normals, normals)


def stream_and_site(key: Key, rows: Tensor) -> tuple[Tensor, int]:
    """Convert a ``Key`` to the arguments of the raw operations.

    Raises:
        TypeError: ``key`` is not a ``Key``, or ``rows`` is not a tensor.
        ValueError: A number of the key is not an integer or is out of range, or ``rows`` is sparse.
    """
    if not isinstance(key, Key):
        raise TypeError(f"key is {key!r} of type {type(key).__name__}; give ttcfast.spec.Key(seed, step, site)")
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows are a {type(rows).__name__}; give an int64 tensor [M, 2], a (problem, candidate) for each row")
    dense(rows=rows)
    check_site(key.site)
    return stream_of(key.seed, key.step, rows.device), key.site


def check_site(site: int) -> None:
    _in_range("site", site, 2**63)


def check_names(rows: Tensor, stream: Tensor, site: int, x: Tensor | None = None) -> None:
    """Check shapes, dtypes and devices of rows and stream, and that ``x`` is on the same device."""
    if rows.dtype != torch.int64 or rows.ndim != 2 or rows.shape[1] != 2:
        raise ValueError(f"rows are {rows.dtype} {tuple(rows.shape)}; give int64 [M, 2], a (problem, candidate) for each row")
    if stream.dtype != torch.int64 or tuple(stream.shape) != (1,) or stream.device != rows.device:
        raise ValueError(
            f"stream is {stream.dtype} {tuple(stream.shape)} on {stream.device}; give int64 [1] on {rows.device}, as stream_of(seed, step, "
            "rows.device) makes it"
        )
    check_site(site)
    if x is not None and x.device != rows.device:
        raise ValueError(f"x is on {x.device} and rows on {rows.device}; give both on one device")


def check_row_values(rows: Tensor) -> None:
    """Check that rows in host memory fit the counter; the C++ path makes the same check with the same messages.

    Rows on a GPU are not checked, since every call would then wait for the device.
    """
    if rows.device.type != "cpu" or rows.shape[0] == 0:
        return
    if int(rows.amin()) < 0:
        raise ValueError(f"rows hold {int(rows.amin())}; problems and candidates are 0 or more")
    if int(rows[:, 0].amax()) > LOW:
        raise ValueError(f"rows hold the problem {int(rows[:, 0].amax())}; problems are below 2**32")


def check_draws(dtype: torch.dtype, name: str, elements: int) -> None:
    """Check that every backend can write the dtype and that the counter can number a row's elements."""
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype}; give float32, float64 or bfloat16")
    if elements > MOST_ELEMENTS:
        raise ValueError(f"a row has {elements} elements; at most 2**34 can be numbered, so split it over sites")


def backends(op: str, cpu: Fill, triton: Fill, reference: Run) -> tuple[Backend, ...]:
    """Register the implementations of a keyed operation; the C++ one checks the values of rows itself."""

    def filled_by(fill: Fill, *, look: bool) -> Run:
        def run(call: Any) -> Tensor:
            if look:
                check_row_values(call.rows)
            out: Tensor = call.empty()
            fill(call, out, call.rows.contiguous())
            return out

        return run

    def defined(call: Any) -> Tensor:
        check_row_values(call.rows)
        return reference(call)

    return register(
        op,
        Backend("cpu", native.available, lambda call: cpu_device(call.rows), filled_by(cpu, look=False)),
        Backend("triton", triton_available, lambda call: triton_device(call.rows.device.type), filled_by(triton, look=True)),
        Backend("reference", yes, yes, defined),
    )


def native_rows(rows: Tensor, stream: Tensor, site: int, antithetic: bool, elements: int) -> tuple[Any, ...]:
    """Return the last arguments of the extension's functions. ``rows`` is contiguous and outlives the call."""
    return rows.data_ptr(), [rows.shape[0], elements], stream.data_ptr(), site, antithetic, *native.threads_and_level()


def grid(x: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """View a tensor [row, ...] as rows of at most three axes: the tensor, three sizes and three strides, with contiguous axes merged.

    A tensor that needs more axes is copied first. One without elements becomes an empty line, since nothing is read from it.
    """
    if x.numel() == 0:  # a copy would preserve strides that cannot be merged
        return x, [1, 1, 0], [0, 0, 1]
    sizes, strides = [1], [0]
    for size, stride in zip(x.shape[1:], x.stride()[1:]):
        if size == 1:
            continue
        if sizes[-1] == 1 or strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 3:
        return grid(x.contiguous())
    pad = 3 - len(sizes)
    return x, [1] * pad + sizes, [0] * pad + strides


def _signed(z: int) -> int:
    """Return the signed number with the low 64 bits of ``z``."""
    return (z + 2**63) % 2**64 - 2**63


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical right shift."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _finalised(z: int) -> int:
    z %= 2**64
    for shift, multiplier in FINALISER:
        z = (z ^ (z >> shift)) * multiplier % 2**64
    return z ^ (z >> 31)


def _in_range(name: str, value: int, end: int) -> None:
    if isinstance(value, (float, bool)) or not 0 <= value < end:
        raise ValueError(f"{name} is {value!r}; give a whole number from 0 to {end - 1}")


def _stream(seed: int, step: int, device: torch.device) -> Tensor:
    _in_range("seed", seed, 2**63)
    _in_range("step", step, 2**63)
    return torch.full((1,), mixed(seed, step), dtype=torch.int64, device=device)


def _fake_stream(seed: int, step: int, device: torch.device) -> Tensor:
    return torch.empty((1,), dtype=torch.int64, device=device)


define.define("stream(SymInt seed, SymInt step, Device device) -> Tensor", _stream, _fake_stream, keys=("CompositeExplicitAutograd",))
