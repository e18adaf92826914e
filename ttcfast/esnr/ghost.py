"""Squared norms of many microbatches' gradients from one backward, without forming those gradients ("ghost norms").

A linear layer's gradient from rows x_r and output gradients g_r is sum_r g_r x_r^T, so its squared norm is
sum_{r,s} (x_r . x_s)(g_r . g_s): two Gram matrices, or two row norms where a microbatch is one row. Where rows are many, the gradient of
each microbatch is formed instead; each layer takes the cheaper way. Weights used several times in one forward (the steps of a rollout,
the evaluations of a Heun loop) have the rows of all uses in one sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .ghost_layers import RULES, Broadcast, Layer, Split

PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the sum of magnitudes; 16-bit backwards round to 2^-8
PROBE_TOLERANCE_16_BIT = 2e-2


class GhostNorms:
    """Measures every microbatch's share of the gradient during one forward and backward.

    ::

        with GhostNorms(actor, samples=1024, microbatches=16) as ghost:
            loss_of(batch).backward()
        squares = ghost.squared_norms()  # [16]

    Samples are in order: microbatch m is samples ``m * b`` to ``(m + 1) * b - 1``, ``b = samples / microbatches``; ``microbatches=samples``
    gives the norm of every single sample. The loss must be a sum or mean over samples of terms that depend on one sample each.

    Args:
        module: what is measured; all its parameters that require grad must belong to ``nn.Linear``, ``nn.LayerNorm`` or ``nn.Embedding``
            modules, or be named in ``broadcast``.
        samples: B, the size of the batch.
        microbatches: M; divides B.
        batch_dim: the axis of the module's activations that is the batch, all features counting as one last axis: 0 for ``[B, D]`` and
            ``[B, T, D]``, -2 for ``[B, D]`` and ``[H, B, D]``. Other axes are sequences, of which a sample owns its part.
        broadcast: names of parameters (as in ``module.named_parameters()``) that enter the forward elementwise beside activations
            ``[..., B, *shape]``, such as a state-independent ``log_std``. During the measurement they appear as ``[B, *shape]``.
        verify: compare what the layers contributed with ``.grad``, along one direction; costs a matrix-vector product per activation.

    Raises:
        ValueError: M does not divide B, or a layer cannot be measured (its name and type are told).

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
        """``[M]``, float64: squared norm over all parameters of each microbatch's share of what the backward left in ``.grad``.

        Of a mean over B samples the share is the microbatch's own mean gradient divided by M.

        Raises:
            ValueError: what a layer contributed is not its parameters' ``.grad``: they are used outside the module's forward or penalised
                in the loss, or ``.grad`` was not zero before.
        """
        found = [*(layer.finish() for layer in self.layers), *(entry.finish() for entry in self.broadcast)]
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
    """One for each module that owns parameters that require grad; all those that cannot be measured are told in one message."""
    layers, refused = [], []
    owners: dict[int, str] = {}
    for path, child in module.named_modules():
        name = path or "the module itself"
        own = {n: p for n, p in child.named_parameters(recurse=False) if p.requires_grad and id(p) not in covered}
        rule = next((rule for kind, rule in RULES.items() if isinstance(child, kind) and type(child).forward is kind.forward), None)
        shared = next((owners[id(p)] for p in own.values() if id(p) in owners), None)
        owners |= {id(p): name for p in own.values()}
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training:
            refused.append(f"{name} ({type(child).__name__}: samples depend on each other)")
        elif own and rule is None:
            refused.append(f"{name} ({type(child).__name__} with {', '.join(own)})")
        elif own and shared:
            refused.append(f"{name} ({type(child).__name__} that shares a parameter with {shared})")
        elif own and rule is not None and (reason := rule.refuses(child)):
            refused.append(f"{name} ({type(child).__name__} with {reason})")
        elif own and rule is not None:
            layers.append(rule(name, child, split))
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
