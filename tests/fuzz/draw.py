"""Random arguments of operations, good and bad: a function of (seed, operation, number) alone, so that every case can be had again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests import cases
from ttcfast.ops import native, registry
from ttcfast.spec import Key

SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257)
LARGE = (1000, 1023, 1025, 2047, 4096, 4097, 5003, 9001)
HARD = (0.0, -0.0, 1.0, -1.0, 1e-3, float("nan"), float("inf"), float("-inf"), -float("nan"))


class Draw:
    def __init__(self, seed: int, op: str, number: int) -> None:
        self.random = random.Random(f"{seed} {op} {number}")
        torch.manual_seed(self.random.getrandbits(60))

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def one_of(self, items: Sequence[Any]) -> Any:
        return self.random.choice(items)

    def size(self, most: int = 1 << 30, least: int = 0) -> int:
        found = self.one_of(LARGE if self.chance(0.1) else SIZES)
        return min(max(found, least), most)

    def shape(self, axes: int, most: int = 20_000, least: int = 0) -> tuple[int, ...]:
        """Sizes whose product is at most ``most``."""
        found: list[int] = []
        for _ in range(axes):
            found.append(self.size(max(1, most), least))
            most //= max(1, found[-1])
        self.random.shuffle(found)
        return tuple(found)

    def values(self, shape: Sequence[int], dtype: torch.dtype, *, tame: bool = False) -> Tensor:
        """Numbers of one kind: those of tests/cases.py, or a mixture of hard ones; tame ones are of order 1, and finite."""
        names = ["uniform", "normal", "ties", "ascending"] if tame else list(cases.VALUES)
        name, shape = self.one_of([*names, *([] if tame else ["hard"])]), tuple(shape)
        if 0 in shape or not shape:
            return torch.randn(shape, dtype=torch.float64).to(dtype)
        if name != "hard":
            return cases.VALUES[name](shape, dtype)
        finfo = torch.finfo(dtype)
        pool = torch.tensor([*HARD, finfo.max, finfo.min, finfo.tiny, finfo.smallest_normal / 4], dtype=torch.float64).to(dtype)
        return pool[torch.randint(0, len(pool), shape)]

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, *, tame: bool = False, expand: bool = True) -> Tensor:
        """Such values in any memory layout; now and then expanded along an axis."""
        shape = list(shape)
        if shape and expand and self.chance(0.1):
            axis, size = self.random.randrange(len(shape)), tuple(shape)
            shape[axis] = min(1, shape[axis])
            return self.layout(self.values(shape, dtype, tame=tame)).expand(size)
        return self.layout(self.values(shape, dtype, tame=tame))

    def layout(self, x: Tensor) -> Tensor:
        """The same numbers elsewhere in memory."""
        kind = self.one_of(["as it is", "as it is", "offset", "permuted", *cases.LAYOUTS])
        if x.ndim == 0 or kind == "as it is":
            return x
        if kind == "offset":  # of one element, so that no vector is aligned
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        if kind == "permuted":
            order = self.random.sample(range(x.ndim), x.ndim)
            return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
        if x.numel() == 0:
            return x.clone()
        return cases.LAYOUTS[kind](x) if x.dtype.is_floating_point else torch.stack([x, ~x], -1)[..., 0]

    def key(self) -> Key:
        return Key(*(self.one_of([0, 1, self.random.getrandbits(31), self.random.getrandbits(63)]) for _ in range(3)))

    def rows(self, count: int) -> Tensor:
        """(problem, candidate) of each row."""
        problems = torch.randint(0, self.one_of([2, 2**32]), (count,))
        return self.layout(torch.stack([problems, torch.randint(0, self.one_of([3, 2**62]), (count,))], 1))

    def machine(self) -> None:
        """Any number of threads and any instruction set; the result may depend on neither."""
        torch.set_num_threads(self.one_of([1, 1, 2, 3, 5]))
        levels = 1 if native.available() is not None else len(native.module().cpu_levels)
        native.highest_level = None if levels == 1 or self.chance(0.5) else self.random.randrange(levels)

    def spoilt(self, arguments: dict[str, Any]) -> tuple[str, Callable[[Draw], Any]]:
        """The name of one argument, and what makes another value of it that does not fit (or by chance still does)."""
        name = self.one_of(list(arguments))
        return name, self.one_of(_wrong(arguments[name]))


def backends(op: str) -> list[str]:
    """What can run on the host here, and "auto"."""
    here = [b.name for b in registry.OPS[op] if b.available() is None and b.name != "cuda"]
    return [*(name for name in here if name != "triton" or registry.interpreting()), "auto"]


def _wrong(value: Any) -> list[Callable[[Draw], Any]]:
    anything: list[Callable[[Draw], Any]] = [lambda d: d.one_of([None, "x", object(), [], [1.0], (), {}, 1.5, float("nan"), torch.ones(2)])]
    if isinstance(value, Tensor):
        return [*anything, *(lambda d, change=change: change(d, value) for change in TENSOR_CHANGES)]
    if isinstance(value, Key):
        parts = [-1, 2**63, 2**70, 1.5, None, "1", True]
        return [*anything, lambda d: replace(value, **{d.one_of(["seed", "step", "site"]): d.one_of(parts)})]
    if isinstance(value, list):
        return [
            *anything,
            lambda d: value[1:],
            lambda d: [*value, torch.ones(3)],
            lambda d: [d.one_of([None, 1.0, torch.ones(7), torch.ones(2).to_sparse()]), *value[1:]],
            lambda d: [d.one_of(TENSOR_CHANGES)(d, t) if isinstance(t, Tensor) else t for t in value],
        ]
    numbers = [-1, 0, 1, 7, 2**31, 2**40, 2**63 - 1, 2**70, -(2**63), 1.5, -0.5, float("nan"), float("inf"), -float("inf"), True]
    return [*anything, lambda d: d.one_of(numbers)]


TENSOR_CHANGES: tuple[Callable[[Draw, Tensor], Any], ...] = (
    lambda d, t: t.to(d.one_of([torch.int64, torch.int32, torch.bool, torch.complex64, torch.float16, torch.bfloat16, torch.float64])),
    lambda d, t: t.unsqueeze(d.one_of([0, -1])),
    lambda d, t: t[0] if t.ndim and len(t) else t.reshape(-1),
    lambda d, t: t.reshape(-1),
    lambda d, t: torch.tensor(1.0).to(t.dtype),
    lambda d, t: torch.cat([t, t], d.random.randrange(t.ndim)) if t.ndim else t.expand(2),
    lambda d, t: t.narrow(axis := d.random.randrange(t.ndim), 0, t.shape[axis] // 2) if t.ndim else t,
    lambda d, t: t.to("meta"),
    lambda d, t: t.to_sparse() if t.ndim else t,
    lambda d, t: torch.empty(0).to(t.dtype),
    lambda d, t: torch.full_like(t, -1) if not t.dtype.is_complex and t.dtype != torch.bool else t,
    lambda d, t: torch.full_like(t, 2**62) if t.dtype == torch.int64 else t.transpose(0, -1) if t.ndim else t,
)
