"""Measures ESNR of a training step on the way, leaving the step's gradient as it would have been."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from ttcfast.checks import one_of
from ttcfast.ops import accumulate_moments

from .ghost import GhostNorms
from .ratio import ESNR, ratios

METHODS = ("loop", "ghost")
VERIFY_EVERY = 100  # measurements: what ghost norms would miss is how the model is written, which seldom changes
BUCKET = 1 << 23  # elements that are sent to the other processes at a time


Measured = tuple[Tensor, Tensor]  # sum of squares of the microbatches' shares of .grad, float64; losses


class Measurement(NamedTuple):
    """``esnr`` of the step; ``losses``, detached: of each microbatch ``[M]`` (loop) or of the batch ``[1]`` (ghost), of this process."""

    esnr: ESNR
    losses: Tensor


class ESNRMeter:
    """Computes the gradient of a batch and its ESNR over M microbatches together.

    ::

        meter = ESNRMeter(actor, 16)
        optimizer.zero_grad()
        found = meter.measure(actor_loss, states)  # in place of actor_loss(states).backward()
        clip_grad_norm_(actor.parameters(), 1.0)
        optimizer.step()

    ``"loop"`` runs forward and backward for each of the M chunks of the batch, in order, as
    ``for chunk in chunks: (loss_of(chunk) / M).backward()`` does; afterwards ``.grad`` holds the same bits as after that loop (and every
    random number was drawn in the same order), so a run that measures equals, bit for bit, the same run in M chunks that does not. It
    works for any model and costs one pass over the gradients per chunk. What ``loss_of`` must not do per chunk is change a running
    statistic, such as that of the returns: do so once, from ``losses`` or before.
    ``"ghost"`` runs one forward and backward of the whole batch; ``.grad`` is that of the plain backward. It needs a model of Linear,
    LayerNorm and Embedding layers and a loss that is a mean over samples (``ttcfast.esnr.ghost``; the first and every hundredth
    measurement verify that no parameter is used in another way), and agrees with the loop to 1e-5 where ``loss_of`` draws no random
    numbers. With ``M=None`` every sample is a microbatch: the least noisy ESNR, at about the cost of the backward alone.
    Both need the sums' difference ``Var``, whose relative error in float32 is about 1e-7 ``raw / sqrt(P)``, P parameters.

    Args:
        module: whose gradient is measured: all its parameters that require grad.
        M: number of microbatches, at least 2; None: one per sample (ghost only).
        method: ``"loop"`` or ``"ghost"``.
        batch_dim: the axis of the tensors given to ``measure`` that is the batch.
        activation_batch_dim: the axis of the module's activations that is the batch, with all features as one last axis (ghost only).
        broadcast: parameters that stand elementwise beside activations (ghost only; see ``GhostNorms``).
        decay: of the moving averages behind ``smoothed``.
        group: of ``torch.distributed``, such as ``torch.distributed.group.WORLD``: every process measures its own part of the batch, all
            with the same M and batch; gradients are averaged over them, and every process gets the ESNR of all their microbatches.
            The module is not wrapped in DistributedDataParallel, which would average before the norms are taken. None: this process alone.

    Raises:
        ValueError: M < 2, an unknown method, parameters of mixed dtype or device, a wrapped module.
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
        self._average = (0.0, 0.0)  # of ||mu||^2 and Var, not corrected for its start
        self._weight = 0.0  # of what the average has seen
        self._measured = 0
        self._last = (2, 1)  # M over all processes and microbatch size of the last measurement

    def measure(self, loss_of: Callable[..., Tensor], *batch: Tensor | None) -> Measurement:
        """Leave the gradient of the batch in ``.grad`` of the module's parameters and say how noisy it is.

        Args:
            loss_of: takes what ``batch`` holds, or a chunk of it, and returns the mean loss over its samples, a scalar.
            batch: tensors of equal size along ``batch_dim``; None is handed on.

        Raises:
            ValueError: M does not divide the batch, or it is smaller; parameters have a gradient that is not zero; the loss is no
                scalar or reaches no parameter.
        """
        parameters = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        _check_parameters(parameters)
        samples = self._samples(batch)
        count = samples if self.M is None else self.M
        if count < 2 or samples % count:
            raise ValueError(f"the batch has {samples} samples and M is {self.M}; M must divide it, and at least 2 microbatches are needed")
        run = self._loop if self.method == "loop" else self._ghost
        squares, losses = run(loss_of, batch, [p for _, p in parameters], count)
        self._last = count, samples // count
        if self.group is not None:
            squares, every = _over_processes(squares, count, [p for _, p in parameters], self.group)
            self._last = every, samples // count
        grads = [p.grad for _, p in parameters if p.grad is not None]
        if not grads:
            raise ValueError("the loss reached no parameter of module; is it the module on which the loss depends?")
        square_of_mean, total = torch.stack([accumulate_moments(grads, None), squares]).tolist()
        variance = self._last[0] * total - square_of_mean  # a microbatch's gradient is M times the share that was measured
        self._record(square_of_mean, variance)
        return Measurement(ratios(square_of_mean, variance, *self._last), losses)

    def smoothed(self) -> ESNR:
        """ESNR from moving averages of signal and noise over the measurements so far, each averaged before the ratio is taken; those that
        were not finite are left out."""
        if not self._weight:
            raise ValueError("nothing finite has been measured yet; call measure first")
        square_of_mean, variance = (value / self._weight for value in self._average)
        return ratios(square_of_mean, variance, *self._last)

    def state_dict(self) -> dict[str, Any]:
        """The averages behind ``smoothed``, for a checkpoint."""
        return {"average": list(self._average), "weight": self._weight, "last": list(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._average, self._weight = (state["average"][0], state["average"][1]), state["weight"]
        self._last = (state["last"][0], state["last"][1])

    def _record(self, square_of_mean: float, variance: float) -> None:
        if not (math.isfinite(square_of_mean) and math.isfinite(variance)):
            return
        old, share = self._average, 1 - self.decay
        self._average = (self.decay * old[0] + share * square_of_mean, self.decay * old[1] + share * max(variance, 0.0))
        self._weight = self.decay * self._weight + share

    def _samples(self, batch: Sequence[Tensor | None]) -> int:
        sizes = {t.shape[self.batch_dim] for t in batch if t is not None}
        if len(sizes) != 1:
            raise ValueError(
                f"batch has {[None if t is None else tuple(t.shape) for t in batch]}; give at least one tensor, all of one size along axis "
                f"{self.batch_dim}"
            )
        return sizes.pop()

    def _loop(self, loss_of: Callable[..., Tensor], batch: Sequence[Tensor | None], parameters: list[Tensor], count: int) -> Measured:
        totals = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}
        squares, losses = [], []
        for chunk in self._chunks(batch, count):
            for p in parameters:
                p.grad = None  # so that autograd hands its own buffer over, which is then ours
            loss = _checked(loss_of(*chunk))
            (loss / count).backward()
            squares.append(_take(parameters, totals))
            losses.append(loss.detach())
        for i, p in enumerate(parameters):
            p.grad = totals.get(i)
        return torch.stack(squares).sum(), torch.stack(losses)

    def _chunks(self, batch: Sequence[Tensor | None], count: int) -> Iterator[tuple[Tensor | None, ...]]:
        parts = [[None] * count if t is None else t.chunk(count, self.batch_dim) for t in batch]
        return zip(*parts)

    def _ghost(self, loss_of: Callable[..., Tensor], batch: Sequence[Tensor | None], parameters: list[Tensor], count: int) -> Measured:
        verify = self._measured % VERIFY_EVERY == 0
        with GhostNorms(
            self.module,
            samples=self._samples(batch),
            microbatches=count,
            batch_dim=self.activation_batch_dim,
            broadcast=self.broadcast,
            verify=verify,
        ) as ghost:
            loss = _checked(loss_of(*batch))
            loss.backward()
        squares = ghost.squared_norms().sum()
        self._measured += 1
        return squares, loss.detach().reshape(1)


def _take(parameters: Sequence[Tensor], totals: dict[int, Tensor]) -> Tensor:
    """Add the gradients just computed to ``totals``, where the first of a parameter becomes its total; their sum of squares."""
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


def _check_parameters(parameters: Sequence[tuple[str, Tensor]]) -> None:
    if not parameters:
        raise ValueError("module has no parameter that requires grad")
    (first, example), *others = parameters
    for name, p in others:
        if (p.dtype, p.device) != (example.dtype, example.device):
            raise ValueError(
                f"{name} is {p.dtype} on {p.device} and {first} {example.dtype} on {example.device}; "
                "gradients of mixed dtype or device cannot be summed"
            )
    before = [p.grad for _, p in parameters if p.grad is not None]
    if before and bool(accumulate_moments(before, None)):
        raise ValueError("the parameters have gradients already; call zero_grad() before measure")


def _over_processes(squares: Tensor, count: int, parameters: Sequence[Tensor], group: Any) -> tuple[Tensor, int]:
    """Average the gradients over the processes; the sum of squares of all shares of that average, and M of all processes together."""
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
    """In place, by buckets of some tensors each."""
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
