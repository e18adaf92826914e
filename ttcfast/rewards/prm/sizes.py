"""Reward models by name: one as large as the shipped surrogate, which is the paper's choice, and one for where every second counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttcfast.checks import one_of

from .network import PairNetwork
from .sketch_files import KINDS

# The shipped surrogate has 0.62M parameters.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "scalar": {
        "seed": {"width": 64, "depth": 6},  # 0.19M
        "surrogate": {"width": 116, "depth": 6},  # 0.61M
        "small": {"width": 32, "depth": 4},  # 0.03M
    },
    "dense": {
        "surrogate": {"width": (24, 48, 68, 88), "depth": 1, "levels": 4, "patch": 1},  # 0.62M
        "small": {"width": (24, 48, 72, 96), "depth": 1, "levels": 4, "patch": 2},  # 0.70M; its convolutions see a quarter of the cells
    },
}


def make_prm(kind: str, in_ch: int, size: str | None = None, sizes: Mapping[str, Any] | None = None, **common: Any) -> PairNetwork:
    """An untrained reward model.

    Args:
        kind: ``"scalar"`` (``PRM``) or ``"dense"`` (``DensePRM``).
        in_ch: 2C.
        size: a name of ``SIZES[kind]``; None takes the class's own defaults.
        sizes: arguments of the class that replace those of ``size``; entries that are None are left out.
        common: normalizer, spec, periodic, padding, info.

    Raises:
        ValueError: an unknown kind, size or argument.
    """
    one_of("kind", kind, tuple(KINDS))
    one_of("size", size, (None, *SIZES[kind]))
    chosen = {**({} if size is None else SIZES[kind][size]), **{k: v for k, v in (sizes or {}).items() if v is not None}}
    try:
        return KINDS[kind](in_ch, **chosen, **common)
    except TypeError as error:
        raise ValueError(f"model has a size that a {kind} reward model has not ({error}); see {KINDS[kind].__name__}") from error
