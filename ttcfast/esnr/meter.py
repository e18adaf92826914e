"""Measures the ESNR of a training step without changing its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from ttcfast.checks import one_of
from ttcfast.ops import accumulate_moments

from .ghost import GhostNorms
from .ratio import ESNR, ratios

METHODS = ("loop", "ghost")
VERIFY_EVERY = 100  # measurements; what ghost norms would miss lies in how the model is written, which seldom changes
BUCKET = 1 << 23  # elements sent to the other processes at a time


class Measurement(NamedTuple):
    """The ``esnr`` of a step and this process's detached ``losses``: of each microbatch ``[M]`` (loop) or of the batch ``[1]`` (ghost)."""

    esnr: ESNR
    losses: Tensor


class ESNRMeter:
    """Computes the gradient of a batch together with its ESNR over M microbatches.

    ::

        meter = ESNRMeter(actor, 16)
        optimizer.zero_grad()
        found = meter.measure(actor_loss, states)  # in place of actor_loss(states).backward()
        clip_grad_norm_(actor.parameters(), 1.0)
        optimizer.step()

    ``"loop"`` runs forward and backward for each of the M chunks of the batch in order, as
    ``for chunk in chunks: (loss_of(chunk) / M).backward()`` does. It draws random numbers in the same order and leaves the same bits in
    ``.grad``, so measuring does not change a run in M chunks. It works for any model, at one pass over the gradients per chunk.
    ``loss_of`` must not update running statistics (such as that of the returns) per chunk: do so before, or once from ``losses``.

    ``"ghost"`` runs one forward and backward of the whole batch and leaves its plain gradient in ``.grad``. It needs a model of Linear,
    LayerNorm and Embedding layers and a loss that is a mean over samples (see ``ttcfast.esnr.ghost``); the first and every hundredth
    measurement verify that no parameter is used in another way. It agrees with the loop to 1e-5 if ``loss_of`` draws no random numbers.
    With ``M=None`` every sample is a microbatch, which gives the least noisy ESNR at about the cost of the backward alone.

    Both take ``Var`` as a difference of sums, whose relative error in float32 is about 1e-7 ``raw / sqrt(P)`` for P parameters.

    Args:
        module: Module to measure, with all its parameters that require grad.
        M: Number of microbatches, at least 2; None for one per sample (ghost only).
        method: ``"loop"`` or ``"ghost"``.
        batch_dim: Batch axis of the tensors given to ``measure``.
        activation_batch_dim: Batch axis of the module's activations, all features counting as one last axis (ghost only).
        broadcast: Names of parameters that enter elementwise beside activations (ghost only; see ``GhostNorms``).
        decay: Decay of the moving averages behind ``smoothed``.
        group: Process group of ``torch.distributed``, such as ``torch.distributed.group.WORLD``; None for this process alone. Every process
            measures its own part of the batch, with the same M and size. Gradients are averaged, and every process gets the ESNR of all
            microbatches. Do not wrap the module in DistributedDataParallel, which averages before the norms are taken.

    Raises:
        ValueError: M is below 2, the method is unknown, or the module is wrapped.
    """

    def __init__(
        self,
        module: nn.Module,
        M: int | None,
        *,
        method: str = "loop",
        batch_dim: int = 0,
        activation_batch_dim: int = 0,
        broadcast: Sequence[str] = (),
        decay: float = 0.9,
        group: Any = None,
    ) -> None:
        one_of("method", method, METHODS)
        if M is None and method != "ghost":
            raise ValueError("M is None, which is one microbatch per sample and needs method='ghost'; give M >= 2")
        if M is not None and M < 2:
            raise ValueError(f"M is {M}; ESNR needs at least 2 microbatches")
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must be in [0, 1)")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError("module is wrapped in DistributedDataParallel; give module.module and group=")
        self.module, self.M, self.method, self.group = module, M, method, group
        self.batch_dim, self.activation_batch_dim, self.broadcast, self.decay = batch_dim, activation_batch_dim, tuple(broadcast), decay
        self._average = (0.0, 0.0)  # of ||mu||^2 and Var, not yet divided by _weight
        self._weight = 0.0  # sum of the weights of what was averaged
        self._measured = 0
        self._last = (2, 1)  # M over all processes and microbatch size of the last measurement

    def measure(self, loss_of: Callable[..., Tensor], *batch: Tensor | None) -> Measurement:
        """Leave the gradient of the batch in ``.grad`` of the module's parameters and return how noisy it is.

        Args:
            loss_of: Function of the tensors in ``batch``, or of a chunk of each, that returns the mean loss over the samples, a scalar.
            batch: Tensors of equal size along ``batch_dim``; None is passed on.

        Raises:
            ValueError: M does not divide the batch or exceeds it, parameters have mixed dtypes or devices or a gradient that is not zero,
                or the loss is not a scalar or reaches no parameter.
        """
        parameters = _trained(self.module)
        samples = self._samples(batch)
        count = samples if self.M is None else self.M
        if count < 2 or samples % count:
            raise ValueError(f"the batch has {samples} samples and M is {self.M}; M must divide it, and at least 2 microbatches are needed")
        run = self._loop if self.method == "loop" else self._ghost
        squares, losses = run(loss_of, batch, parameters, count)
        self._last = count, samples // count
        if self.group is not None:
            squares, every = _over_processes(squares, count, parameters, self.group)
            self._last = every, samples // count
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            raise ValueError("the loss reached no parameter of module; is it the module on which the loss depends?")
        square_of_mean, total = torch.stack([accumulate_moments(grads, None), squares]).tolist()
        variance = self._last[0] * total - square_of_mean  # a microbatch's gradient is M times the share that was measured
        if math.isfinite(square_of_mean) and math.isfinite(variance):
            old, share = self._average, 1 - self.decay
            self._average = (self.decay * old[0] + share * square_of_mean, self.decay * old[1] + share * max(variance, 0.0))
            self._weight = self.decay * self._weight + share
        return Measurement(ratios(square_of_mean, variance, *self._last), losses)

    def smoothed(self) -> ESNR:
        """Return the ratio of the moving averages of signal and noise over all finite measurements so far.

        Raises:
            ValueError: Nothing finite has been measured.
        """
        if not self._weight:
            raise ValueError("nothing finite has been measured yet; call measure first")
        square_of_mean, variance = (value / self._weight for value in self._average)
        return ratios(square_of_mean, variance, *self._last)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages behind ``smoothed``, for a checkpoint."""
        return {"average": list(self._average), "weight": self._weight, "last": list(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._average, self._weight = (state["average"][0], state["average"][1]), state["weight"]
        self._last = (state["last"][0], state["last"][1])

    def _samples(self, batch: Sequence[Tensor | None]) -> int:
        sizes = {t.shape[self.batch_dim] for t in batch if t is not None}
        if len(sizes) != 1:
            raise ValueError(
                f"batch has {[None if t is None else tuple(t.shape) for t in batch]}; give at least one tensor, all of one size along axis "
                f"{self.batch_dim}"
            )
        return sizes.pop()

    def _loop(
        self, loss_of: Callable[..., Tensor], batch: Sequence[Tensor | None], parameters: Sequence[Tensor], count: int
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of squares of the microbatches' shares of ``.grad``, float64, and their losses."""
        totals = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}
        squares, losses = [], []
        parts = [[None] * count if t is None else t.chunk(count, self.batch_dim) for t in batch]
        for chunk in zip(*parts):
            for p in parameters:
                p.grad = None  # so that autograd hands over its own buffer
            loss = _checked(loss_of(*chunk))
            (loss / count).backward()
            squares.append(_take(parameters, totals))
            losses.append(loss.detach())
        for i, p in enumerate(parameters):
            p.grad = totals.get(i)
        return torch.stack(squares).sum(), torch.stack(losses)

    def _ghost(
        self, loss_of: Callable[..., Tensor], batch: Sequence[Tensor | None], parameters: Sequence[Tensor], count: int
    ) -> tuple[Tensor, Tensor]:
        """As ``_loop``, with the loss of the whole batch."""
        with GhostNorms(
            self.module,
            samples=self._samples(batch),
            microbatches=count,
            batch_dim=self.activation_batch_dim,
            broadcast=self.broadcast,
            verify=self._measured % VERIFY_EVERY == 0,
        ) as ghost:
            loss = _checked(loss_of(*batch))
            loss.backward()
        squares = ghost.squared_norms().sum()
        self._measured += 1
        return squares, loss.detach().reshape(1)


def _take(parameters: Sequence[Tensor], totals: dict[int, Tensor]) -> Tensor:
    """Add the gradients just computed to ``totals``, the first of a parameter becoming its total; return their sum of squares."""
    found = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}
    later = [i for i in found if i in totals]
    first = {i: grad for i, grad in found.items() if i not in totals}
    sums = [accumulate_moments([found[i] for i in later], [totals[i] for i in later])] if later else []
    if first:
        sums.append(accumulate_moments(list(first.values()), None))
        totals.update(first)
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=parameters[0].device)


def _checked(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        what = f"a tensor of shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"loss_of returned {what}; it must return the mean loss, a scalar that depends on the parameters")
    return loss


def _trained(module: nn.Module) -> list[Tensor]:
    """Return the parameters that require grad, checked to be alike in dtype and device and without a gradient."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("module has no parameter that requires grad")
    first, example = next(iter(named.items()))
    for name, p in named.items():
        if (p.dtype, p.device) != (example.dtype, example.device):
            raise ValueError(
                f"{name} is {p.dtype} on {p.device} and {first} {example.dtype} on {example.device}; "
                "gradients of mixed dtype or device cannot be summed"
            )
    before = [p.grad for p in named.values() if p.grad is not None]
    if before and bool(accumulate_moments(before, None)):
        raise ValueError("the parameters have gradients already; call zero_grad() before measure")
    return list(named.values())


def _over_processes(squares: Tensor, count: int, parameters: Sequence[Tensor], group: Any) -> tuple[Tensor, int]:
    """Average the gradients over the processes; return the sum of squares of all shares of the average, and M of all processes together."""
    world = distributed.get_world_size(group)
    here = [squares.new_tensor([count, count * count]), squares.reshape(1), squares.new_tensor([p.grad is not None for p in parameters])]
    there = torch.cat(here)
    distributed.all_reduce(there, group=group)
    counts, square_counts, total, *present = there.tolist()
    if world * square_counts != counts * counts:
        raise ValueError(f"the processes measure different numbers of microbatches (here {count}, {counts / world:g} on average)")
    reached = [p for p, anywhere in zip(parameters, present) if anywhere]
    for p in reached:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    _average_over([p.grad for p in reached if p.grad is not None], world, group)
    return squares.new_tensor(total / world**2), int(counts)


def _average_over(tensors: Sequence[Tensor], world: int, group: Any) -> None:
    """Average ``tensors`` over the processes in place, in buckets of several tensors."""
    bucket: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= BUCKET or i == len(tensors) - 1:
            flat = torch.cat([t.reshape(-1) for t in bucket])
            distributed.all_reduce(flat, group=group)
            flat /= world
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket])):
                t.copy_(part.view_as(t))
            bucket = []
