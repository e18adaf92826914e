"""Names sizes of reward models: one as large as the shipped surrogate, which is the paper's choice, and a smaller one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttcfast.checks import one_of

from .network import PairNetwork

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
    """Builds an untrained reward model.

    Args:
        kind: ``"scalar"`` (``PRM``) or ``"dense"`` (``DensePRM``).
        in_ch: Channels of state and candidate together, 2C.
        size: Name in ``SIZES[kind]``; None means the defaults of the class.
        sizes: Arguments of the class that override those of ``size``; entries that are None are ignored.
        common: ``normalizer``, ``spec``, ``periodic``, ``padding``, ``residual``, ``info``.

    Raises:
        ValueError: The kind, size or an argument is unknown.
    """
    one_of("kind", kind, tuple(SIZES))
    one_of("size", size, (None, *SIZES[kind]))
    network = PairNetwork.kinds[kind]
    chosen = {**({} if size is None else SIZES[kind][size]), **{k: v for k, v in (sizes or {}).items() if v is not None}}
    try:
        return network(in_ch, **chosen, **common)
    except TypeError as error:
        raise ValueError(f"model has a size that a {kind} reward model has not ({error}); see {network.__name__}") from error
