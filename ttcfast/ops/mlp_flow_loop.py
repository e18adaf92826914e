"""The steps of a velocity MLP and their backward pass, as matrix products and the fused operations between them.

Inside, every tensor has an axis of S sets of parameters, 1 if there is a single one. One set of buffers per call holds all evaluations
contiguously, so that the backward pass computes each layer's weight gradient as a single matrix product. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import heun, norm_mish
from .norm_mish import Gradients, Layer

# What the forward pass saves: nothing, enough for the gradients of z and rows, or enough for all gradients.
NOTHING, FROZEN, TRAINED = 0, 1, 2


class Call(NamedTuple):
    """The arguments of ``torch.ops.ttcfast.mlp_flow``, checked.

    With S sets of parameters, these begin with an axis of size S, and so do z and every step's rows.
    """

    z: Tensor  # [B, D]
    rows: Tensor | None  # [B, U1], or [T, B, U1] for T steps
    times: Tensor  # [K + 1, U1], or [K, U1] for Euler and [1, U1] for "map"
    weights: list[Tensor]  # [U1, D], [U2, U1], ..., [O, Un]
    biases: list[Tensor]  # of all products but the first: [U2], ..., [O]
    scales: list[Tensor]  # of LayerNorm: [U1], ..., [Un]
    shifts: list[Tensor]
    method: str
    substeps: int
    group: int
    eps: float
    half: bool
    keep: int

    @property
    def stacked(self) -> bool:
        """Whether there is an axis of sets of parameters."""
        return self.weights[0].ndim == 3

    @property
    def steps(self) -> int | None:
        """Number of steps, None without an axis of steps."""
        return None if self.rows is None or self.rows.ndim == self.z.ndim else self.rows.shape[0]

    @property
    def times_of_step(self) -> list[int]:
        """Return the index into ``times`` of every evaluation of a step, in order."""
        if self.method == "heun":
            return [k + second for k in range(self.substeps) for second in (0, 1)]
        return list(range(self.substeps))

    @property
    def evaluations(self) -> int:
        return len(self.times_of_step) * (1 if self.steps is None else self.steps)

    @property
    def matmul_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else self.z.dtype

    @property
    def dt(self) -> float:
        return 1 / self.substeps

    def sets(self, t: Tensor) -> Tensor:
        """Return ``t`` with its axis of sets of parameters."""
        return t if self.stacked else t.unsqueeze(0)

    def by_step(self, t: Tensor) -> Tensor:
        """Return a tensor shaped like ``rows`` as ``[T, S, B, ...]``."""
        t = t.unsqueeze(0) if self.steps is None else t
        return t if self.stacked else t.unsqueeze(1)

    def as_given(self, t: Tensor) -> Tensor:
        """Return a tensor ``[T, S, B, ...]`` shaped like ``rows``, the inverse of :meth:`by_step`."""
        t = t if self.stacked else t.squeeze(1)
        return t.squeeze(0) if self.steps is None else t

    def empty(self) -> Tensor:
        """Allocate the result: the state after each step."""
        steps = () if self.steps is None else (self.steps,)
        return self.z.new_empty((*steps, *self.z.shape[:-1], self.weights[-1].shape[-2]))

    def products(self) -> list[Tensor]:
        """Return the weights ``[S, O, I]`` in the dtype of the products."""
        return [self.sets(w).to(self.matmul_dtype) for w in self.weights]

    def layers(self) -> list[list[list[Layer]]]:
        """Return the parameters of the steps after each product, by product, time (of the first alone) and set of parameters."""

        def parts(t: Tensor) -> Sequence[Tensor]:
            return t.unbind(0) if self.stacked else (t,)

        by_time: list[Sequence[Sequence[Tensor]]] = [[parts(t) for t in self.times.unbind(-2)], *([parts(b)] for b in self.biases)]
        return [
            [[Layer(*p, self.eps) for p in zip(bias, parts(scale), parts(shift))] for bias in biases]
            for biases, scale, shift in zip(by_time, self.scales, self.shifts)
        ]


class Kept(NamedTuple):
    """Tensors saved for the backward pass, each of leading shape [evaluations, S, B]."""

    products: list[Tensor]  # inputs of norm_mish, [E, S, B, U] per hidden layer
    stats: list[Tensor]  # per hidden layer, [E, S, B, 2]
    inputs: list[Tensor]  # inputs of the first product, [E, S, B, D], if weights are trained; otherwise empty

    def flat(self) -> list[Tensor]:
        return [*self.products, *self.stats, *self.inputs]

    @classmethod
    def of(cls, flat: Sequence[Tensor], hidden: int) -> Kept:
        return cls(list(flat[:hidden]), list(flat[hidden : 2 * hidden]), list(flat[2 * hidden :]))


@dataclass(frozen=True)
class Pieces:
    """The fused operations of one backend."""

    norm_mish: Callable[[Tensor, Tensor | None, Layer, Tensor, Tensor], None]
    norm_mish_backward: Callable[[Tensor, Tensor, Tensor | None, Layer, Tensor, Gradients], None]
    update: Callable[[Tensor | None, Tensor, Tensor | None, float, float, int, Tensor], None]


REFERENCE = Pieces(norm_mish.fill_reference, norm_mish.fill_backward_reference, heun.fill_reference)
CPU = Pieces(norm_mish.fill_cpu, norm_mish.fill_backward_cpu, heun.fill_cpu)
TRITON = Pieces(norm_mish.fill_triton, norm_mish.fill_backward_triton, heun.fill_triton)


def buffers(call: Call) -> Kept:
    """Allocate buffers for all evaluations, or for one if nothing is saved."""
    count, z = call.evaluations if call.keep != NOTHING else 1, call.sets(call.z)
    lead, widths = (count, *z.shape[:2]), [s.shape[-1] for s in call.scales]
    products = [z.new_empty((*lead, u), dtype=call.matmul_dtype) for u in widths]
    stats = [z.new_empty((*lead, 2)) for _ in widths]
    inputs = [z.new_empty((*lead, z.shape[2]), dtype=call.matmul_dtype)] if call.keep == TRAINED else []
    return Kept(products, stats, inputs)


def each(first: Tensor, *others: Tensor | None) -> Iterable[Sequence[Any]]:
    """Yield the parts of tensors ``[S, ...]`` for each set of parameters, None for None."""
    return zip(first.unbind(0), *([None] * first.shape[0] if t is None else t.unbind(0) for t in others))


class Forward:
    """Forward pass over the steps."""

    def __init__(self, call: Call, pieces: Pieces) -> None:
        self.call, self.pieces, self.kept = call, pieces, buffers(call)
        self.layers, self.weights = call.layers(), [w.transpose(1, 2) for w in call.products()]
        # In bfloat16, the products' inputs are copies; otherwise states are written directly into the products' inputs.
        self.bias = call.sets(call.biases[-1]).to(call.matmul_dtype).unsqueeze(1)
        self.active = [torch.empty_like(product[0]) for product in self.kept.products]
        self.at = 0

    def run(self) -> Tensor:
        call, z = self.call, self.call.sets(self.call.z)
        rows = [None] if call.rows is None else list(call.by_step(call.rows))
        results = z.new_empty((len(rows), *z.shape[:2], call.weights[-1].shape[-2]))
        if call.method != "map" or call.half:
            self.slopes = [torch.empty_like(results[0], dtype=call.matmul_dtype) for _ in range(2)]
        self.predicted = torch.empty_like(z) if call.method == "heun" else z
        for given, result in zip(rows, results):
            self.step(z, given, result)
            z = result
        return call.as_given(results)

    def step(self, z: Tensor, rows: Tensor | None, result: Tensor) -> None:
        """Fill ``result`` with the state after the one at ``z``."""
        call, update = self.call, self.pieces.update
        if call.method == "map":
            out = self.slopes[0] if call.half else result
            self.velocity(z, rows, 0, out)
            if call.half:
                result.copy_(out)
            return
        k1, k2 = self.slopes
        for k in range(call.substeps):
            self.velocity(z, rows, k, k1)
            if call.method == "euler":
                update(z, k1, None, call.dt, 1.0, call.group, result)
            else:
                update(z, k1, None, call.dt, 1.0, call.group, self.predicted)
                self.velocity(self.predicted, rows, k + 1, k2)
                update(z, k1, k2, 0.5 * call.dt, 1.0, call.group, result)
            z = result

    def velocity(self, z: Tensor, rows: Tensor | None, time: int, out: Tensor) -> None:
        """Fill ``out`` with the slope at ``z``, before group means are subtracted."""
        slot = self.at if self.call.keep != NOTHING else 0
        x = z
        if self.kept.inputs:
            x = self.kept.inputs[0][slot].copy_(z)
        elif self.call.half:
            x = z.to(torch.bfloat16)
        for index, (weight, active) in enumerate(zip(self.weights, self.active)):
            product, stats = self.kept.products[index][slot], self.kept.stats[index][slot]
            torch.bmm(x, weight, out=product)
            parts = each(product, None if index else rows, active, stats)
            for layer, (p, r, a, s) in zip(self.layers[index][0 if index else time], parts):
                self.pieces.norm_mish(p, r, layer, a, s)
            x = active
        torch.baddbmm(self.bias, x, self.weights[-1], out=out)
        self.at += 1


class Result(NamedTuple):
    """Gradients; unwanted ones are empty tensors and lists."""

    z: Tensor
    rows: Tensor
    times: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    scales: list[Tensor]
    shifts: list[Tensor]


class Backward:
    """Backward pass over the steps, last to first."""

    def __init__(self, call: Call, kept: Kept, pieces: Pieces) -> None:
        self.call, self.kept, self.pieces, self.layers = call, kept, pieces, call.layers()
        self.trained, self.weights = call.keep == TRAINED, call.products()
        self.given = None if call.rows is None else call.by_step(call.rows)
        count = call.evaluations if self.trained else 1
        z = call.sets(call.z)
        self.of_products = [p.new_empty((count, *p.shape[1:])) for p in kept.products]
        self.of_slopes = z.new_empty((count, *z.shape[:2], call.weights[-1].shape[-2]), dtype=call.matmul_dtype)
        self.active = [torch.empty_like(p) for p in kept.products] if self.trained else []
        of_layers = [z.new_empty((count, z.shape[0], p.shape[-1])) for p in kept.products for _ in range(2) if self.trained]
        self.scales, self.shifts = of_layers[::2], of_layers[1::2]
        self.rows = None if self.given is None or self.trained else torch.zeros_like(self.given)
        self.at = call.evaluations

    def run(self, grad: Tensor) -> Result:
        """Run the pass from ``grad``, the gradient of the result."""
        per_step = self.call.by_step(grad)
        total = per_step[-1]
        for step in reversed(range(len(per_step))):
            total = self.step(total, step)
            if step:
                total += per_step[step - 1]
        return self.result(total)

    def step(self, grad: Tensor, step: int) -> Tensor:
        """Return the gradient of a step's start from that of its end."""
        call, update, group = self.call, self.pieces.update, self.call.group
        if call.method == "map":
            slope = self.slot(self.of_slopes) if self.trained or call.half else grad
            return self.evaluation(0, slope if slope is grad else slope.copy_(grad), step).to(grad.dtype)
        grad = grad.clone()  # becomes the gradient of each substep's start in turn
        half_step = 0.5 * call.dt
        for k in reversed(range(call.substeps)):
            slope = self.slot(self.of_slopes)
            if call.method == "euler":
                update(None, grad, None, call.dt, 1.0, group, slope)
                grad += self.evaluation(k, slope, step)
                continue
            update(None, grad, None, half_step, 1.0, group, slope)
            of_predicted = self.evaluation(k + 1, slope, step)
            slope = self.slot(self.of_slopes)
            update(None, grad, of_predicted, half_step, 2.0, group, slope)
            grad += of_predicted
            grad += self.evaluation(k, slope, step)
        return grad

    def slot(self, buffer: Tensor) -> Tensor:
        """Return the buffer of the next evaluation, the one before ``at``."""
        return buffer[self.at - 1 if self.trained else 0]

    def evaluation(self, time: int, slope: Tensor, step: int) -> Tensor:
        """Return the gradient of an evaluation's input from that of its slope."""
        grad, at = slope, self.at - 1
        for index in reversed(range(len(self.kept.products))):
            grad, out = torch.bmm(grad, self.weights[index + 1]), self.slot(self.of_products[index])
            rows = None if index or self.given is None else self.given[step]
            trained = [part[index][at] for part in (self.active, self.scales, self.shifts)] if self.trained else [None] * 3
            parts = each(grad, self.kept.products[index][at], rows, self.kept.stats[index][at], out, *trained)
            for layer, (g, p, r, s, *wanted) in zip(self.layers[index][0 if index else time], parts):
                self.pieces.norm_mish_backward(g, p, r, layer, s, Gradients(*wanted))
            grad = out
        if self.rows is not None:
            self.rows[step] += grad
        self.at -= 1
        return torch.bmm(grad, self.weights[0])

    def result(self, grad: Tensor) -> Result:
        call, none = self.call, self.call.times.new_empty(0)
        of_z = grad if call.stacked else grad.squeeze(0)
        if not self.trained:
            return Result(of_z, none if self.rows is None else call.as_given(self.rows), none, [], [], [], [])
        dtype, first = call.z.dtype, self.of_products[0].unflatten(0, (-1, len(call.times_of_step)))  # [T, E / T, S, B, U1]
        outputs = [*self.of_products, self.of_slopes]
        per_time = first.sum((0, 3), dtype=dtype)  # [E / T, S, U1]
        times = torch.zeros_like(call.sets(call.times)).transpose(0, 1)
        if call.method == "heun":
            times[:-1] += per_time[0::2]
            times[1:] += per_time[1::2]
        else:
            times += per_time
        rows = none if call.rows is None else call.as_given(first.sum(1, dtype=dtype) if first.shape[1] > 1 else first[:, 0].to(dtype))
        found = (
            # All evaluations at once: one product per layer, whose inner size is E B.
            [torch.bmm(_joined(o).transpose(1, 2), _joined(i)).to(dtype) for o, i in zip(outputs, [*self.kept.inputs, *self.active])],
            [o.sum((0, 2), dtype=dtype) for o in outputs[1:]],
            [s.sum(0) for s in self.scales],
            [s.sum(0) for s in self.shifts],
        )
        if call.stacked:
            return Result(of_z, rows, times.transpose(0, 1), *found)
        return Result(of_z, rows, times.squeeze(1), *([t.squeeze(0) for t in part] for part in found))


def _joined(t: Tensor) -> Tensor:
    """Return ``[E, S, B, U]`` as ``[S, E B, U]``."""
    return t.transpose(0, 1).flatten(1, 2)
