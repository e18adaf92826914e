"""Squared gradient norms of many microbatches from one backward, without forming those gradients ("ghost norms").

A linear layer's gradient from rows x_r and output gradients g_r is sum_r g_r x_r^T, so its squared norm is
sum_{r,s} (x_r . x_s)(g_r . g_s): two Gram matrices, or two row norms if a microbatch is one row. With many rows the gradient of each
microbatch is formed instead; each layer takes the cheaper way. Where one forward uses a weight several times (the steps of a rollout, the
evaluations of a Heun loop), the rows of all uses enter one sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .ghost_layers import RULES, Broadcast, Layer, Split

PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the sum of magnitudes; 16-bit backwards round to 2^-8
PROBE_TOLERANCE_16_BIT = 2e-2


class GhostNorms:
    """Measures the share of every microbatch in the gradient during one forward and backward.

    ::

        with GhostNorms(actor, samples=1024, microbatches=16) as ghost:
            loss_of(batch).backward()
        squares = ghost.squared_norms()  # [16]

    Microbatch m holds the samples ``m * b`` to ``(m + 1) * b - 1`` with ``b = samples / microbatches``; ``microbatches=samples`` gives the
    norm of every sample. The loss must be a sum or mean over samples of terms that depend on one sample each.

    Args:
        module: Module to measure. All its parameters that require grad must belong to ``nn.Linear``, ``nn.LayerNorm`` or ``nn.Embedding``
            modules, or be named in ``broadcast``.
        samples: Size B of the batch.
        microbatches: Number M of microbatches; it must divide B.
        batch_dim: Batch axis of the module's activations, all features counting as one last axis: 0 for ``[B, D]`` and ``[B, T, D]``, -2
            for ``[B, D]`` and ``[H, B, D]``. The other axes are sequences, of which each sample owns its part.
        broadcast: Names of parameters (as in ``module.named_parameters()``) that enter the forward elementwise beside activations
            ``[..., B, *shape]``, such as a state-independent ``log_std``. While they are measured they appear as ``[B, *shape]``.
        verify: Compare the contributions of the layers with ``.grad`` along one direction, at a matrix-vector product per activation.

    Raises:
        ValueError: M does not divide B, or a layer cannot be measured; the message names it and its type.

    Source: Goodfellow, "Efficient per-example gradient computations", 2015; "ghost clipping" of Bu et al., arXiv:2205.10683.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        samples: int,
        microbatches: int,
        batch_dim: int = 0,
        broadcast: Sequence[str] = (),
        verify: bool = True,
    ) -> None:
        if microbatches < 1 or samples % microbatches:
            raise ValueError(f"samples is {samples} and microbatches {microbatches}; the second must divide the first")
        split = Split(samples, microbatches, batch_dim, verify)
        self.microbatches, self.verify = microbatches, verify
        self.broadcast = [Broadcast(name, *_owner(module, name), split) for name in broadcast]
        self.layers = _layers(module, {id(b.parameter) for b in self.broadcast}, split)
        self.handles: list[Any] = []

    def __enter__(self) -> GhostNorms:
        for layer in self.layers:
            self.handles.append(layer.module.register_forward_hook(layer.after_forward, with_kwargs=True))
        for entry in self.broadcast:
            entry.put()
        return self

    def __exit__(self, *_: object) -> None:
        while self.handles:
            self.handles.pop().remove()
        for entry in self.broadcast:
            entry.remove()

    def squared_norms(self) -> Tensor:
        """Return the squared norm, over all parameters, of each microbatch's share of ``.grad``; ``[M]`` float64.

        For a loss that is a mean over samples, the share is the microbatch's own mean gradient divided by M.

        Raises:
            ValueError: The contributions of a layer do not add up to the ``.grad`` of its parameters: they are used outside the module's
                forward or penalised in the loss, or ``.grad`` was not zero before.
        """
        for layer in self.layers:
            layer.measure()
        found = [*(layer.norms for layer in self.layers), *(entry.norms for entry in self.broadcast)]
        parts = [norms for norms in found if norms is not None]
        if self.verify:
            self._verify()
        return torch.stack(parts).sum(0) if parts else torch.zeros(self.microbatches, dtype=torch.float64)

    def _verify(self) -> None:
        probes = [probe for layer in self.layers for probe in layer.probes()]
        if not probes:
            return
        values = torch.stack([torch.stack([x.double() for x in probe[2:]]) for probe in probes]).tolist()
        for (layer, parameter, *_), (found, size, actual, offset) in zip(probes, values):
            exact = torch.finfo(torch.promote_types(layer.dtype, torch.float32))
            allowed = (PROBE_TOLERANCE.get(layer.dtype, PROBE_TOLERANCE_16_BIT) + 8 * exact.eps * offset) * size + exact.tiny
            if math.isfinite(found - actual) and abs(found - actual) > allowed:  # what is not finite shows in the norms
                raise ValueError(
                    f"the gradient of {layer.name}.{parameter} is not what the calls of {layer.name} ({type(layer.module).__name__}) "
                    f"contributed (along one direction {actual:.6g} and {found:.6g}): the parameter is used elsewhere or penalised in the "
                    "loss, or .grad was not zero before. Use method='loop'"
                )


def _layers(module: nn.Module, covered: set[int], split: Split) -> list[Layer]:
    """Return a rule for each module that owns parameters that require grad; one error names all modules that cannot be measured."""
    layers: list[Layer] = []
    refused: list[str] = []
    owners: dict[int, str] = {}
    for path, child in module.named_modules():
        name = path or "the module itself"
        own = {n: p for n, p in child.named_parameters(recurse=False) if p.requires_grad and id(p) not in covered}
        rule = next((rule for kind, rule in RULES.items() if isinstance(child, kind) and type(child).forward is kind.forward), None)
        shared = next((owners[id(p)] for p in own.values() if id(p) in owners), None)
        owners |= {id(p): name for p in own.values()}
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training:
            reason = ": samples depend on each other"
        elif not own:
            continue
        elif rule is None:
            reason = f" with {', '.join(own)}"
        elif shared:
            reason = f" that shares a parameter with {shared}"
        elif isinstance(child, nn.Embedding) and (child.sparse or child.scale_grad_by_freq):
            reason = " with sparse=True" if child.sparse else " with scale_grad_by_freq=True"
        else:
            layers.append(rule(name, child, split))
            continue
        refused.append(f"{name} ({type(child).__name__}{reason})")
    if refused:
        raise ValueError(
            f"ghost norms know Linear, LayerNorm, Embedding and parameters named in broadcast, but not {'; '.join(refused)}. "
            "Use the loop over microbatches (method='loop')"
        )
    return layers


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    known = dict(module.named_parameters())
    if name not in known:
        raise ValueError(f"broadcast names {name!r}; the parameters are {', '.join(known)}")
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute
