"""Compiles a model's call into one graph of fixed shapes, of which the noise's key and rows are inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ttcfast.runtime.errors import UserError, first_line
from ttcfast.runtime.turns import interruptible

logger = logging.getLogger(__name__)

MODES = ("default", "max-autotune-no-cudagraphs")  # CUDA-graph modes return memory that the next call overwrites


class CompileError(UserError):
    """Raised for a model that cannot be compiled, with the reason."""


class CompiledCall:
    """A compiled function of tensors, with the state of the model that it relies on."""

    def __init__(self, graph: Callable[..., Any], structure: Any, held: tuple[Any, ...]) -> None:
        self._graph, self._structure, self.held = graph, structure, held

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        return tree_unflatten(list(self._graph(*inputs)), self._structure)


def compiled_call(
    run: Callable[..., Any], inputs: tuple[Tensor, ...], *, model: nn.Module, mode: str, held: tuple[Any, ...] = ()
) -> CompiledCall:
    """Records ``run(*inputs)`` operation by operation and compiles it for these shapes.

    ``make_fx`` records below Python: hooks, replaced forwards and contexts act during the recording and leave only operations. Noise
    therefore costs no guards, and a new step, seed or set of candidates changes the contents of input tensors but needs no recompilation.
    Weights are held by reference: their values may change, but the tensors may not be replaced. Numbers and flags other than tensors are
    those of the recording.

    Args:
        run: Function of tensors that returns tensors in any nesting. It is run twice on ``inputs``.
        inputs: Tensors with the shapes, dtypes and device that every call will have.
        model: Model, named in errors.
        mode: Mode of torch.compile, one of ``MODES``.
        held: Stored with the call, for the caller to check whether it is still valid.

    Raises:
        CompileError: The model branches on values or returns something other than tensors, or Inductor fails (no C++ compiler or Triton).
    """
    name = type(model).__name__
    structure: list[Any] = []

    def flat(*values: Tensor) -> list[Any]:
        leaves, spec = tree_flatten(run(*values))
        structure.append(spec)
        return leaves

    began = time.perf_counter()
    with torch.no_grad():
        run(*inputs)  # errors of the model itself are raised unchanged
    try:
        with torch.no_grad():
            recorded = make_fx(flat)(*inputs)
            graph = torch.compile(recorded, dynamic=False, fullgraph=True, mode=mode)
            call = CompiledCall(graph, structure[-1], held)
            with interruptible():
                call(*inputs)
    except Exception as error:
        raise CompileError(
            f"{name} cannot be compiled: {type(error).__name__}: {first_line(error)}; use compile=False, or a model whose path does not "
            "depend on values"
        ) from error
    logger.info("%s compiled for %s in %.1f s", name, [tuple(t.shape) for t in inputs], time.perf_counter() - began)
    return call
