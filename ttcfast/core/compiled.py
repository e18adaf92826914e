"""A model's call as one compiled graph of fixed shapes, in which the noise's key and rows are inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ttcfast.runtime.errors import UserError
from ttcfast.runtime.turns import interruptible

logger = logging.getLogger(__name__)

MODES = ("default", "max-autotune-no-cudagraphs")  # CUDA-graph modes hand out memory that the next call writes over


class CompileError(UserError):
    """A model that cannot be compiled, with what stopped it."""


class CompiledCall:
    """A compiled function of tensors, and what it takes for given of the model, as its maker saw it."""

    def __init__(self, graph: Callable[..., Any], structure: Any, held: tuple[Any, ...]) -> None:
        self._graph, self._structure, self.held = graph, structure, held

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        return tree_unflatten(list(self._graph(*inputs)), self._structure)


def compiled_call(
    run: Callable[..., Any], inputs: tuple[Tensor, ...], *, model: nn.Module, mode: str, held: tuple[Any, ...] = ()
) -> CompiledCall:
    """``run(*inputs)``, recorded operation by operation and compiled for these shapes.

    Recorded by ``make_fx`` below Python: hooks, replaced forwards and contexts act while it records and leave operations only, so the
    noise of a surrogate costs no guards, and a new step, seed or set of candidates, being contents of input tensors, no recompilation.
    Weights are held by reference: their values may change, the tensors themselves may not be replaced. Numbers and flags that are no
    tensors are those of the recording.

    Args:
        run: a function of tensors that returns tensors in any nesting. It is run twice on ``inputs``.
        inputs: of the shapes, dtypes and device that the call will always get.
        model: named in errors.
        mode: of torch.compile, one of ``MODES``.
        held: kept beside the call, for the caller to tell whether it is still valid.

    Raises:
        CompileError: the model branches on values, returns something else than tensors, or Inductor fails (no C++ compiler, no Triton).
    """
    name = type(model).__name__
    structure: list[Any] = []

    def flat(*values: Tensor) -> list[Any]:
        leaves, spec = tree_flatten(run(*values))
        structure.append(spec)
        return leaves

    began = time.perf_counter()
    with torch.no_grad():
        run(*inputs)  # what is wrong with the model itself is raised as it is
    try:
        with torch.no_grad():
            recorded = make_fx(flat)(*inputs)
            graph = torch.compile(recorded, dynamic=False, fullgraph=True, mode=mode)
            call = CompiledCall(graph, structure[-1], held)
            with interruptible():
                call(*inputs)
    except Exception as error:
        raise CompileError(
            f"{name} cannot be compiled: {type(error).__name__}: {_first_line(error)}; use compile=False, or a model whose path does not "
            "depend on values"
        ) from error
    logger.info("%s compiled for %s in %.1f s", name, [tuple(t.shape) for t in inputs], time.perf_counter() - began)
    return call


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
