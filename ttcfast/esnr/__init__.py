"""Signal-to-noise ratio of gradients: ``ratio`` of stacked gradients, ``meter`` of training steps, ``ghost`` norms from one backward.

The package is callable and then acts as ``ratio.esnr``, since version 0.1 exported that function as ``ttcfast.esnr``.
"""

import sys
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from .ratio import ESNR, esnr


class _Callable(ModuleType):
    def __call__(self, grads: Tensor | Sequence[Tensor | Sequence[Tensor]], *, microbatch_size: int = 1) -> ESNR:
        return esnr(grads, microbatch_size=microbatch_size)


sys.modules[__name__].__class__ = _Callable
