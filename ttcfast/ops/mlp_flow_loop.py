"""The K substeps of a velocity MLP and their backward pass, as matrix products and the fused operations between them.

One set of buffers per call holds all evaluations contiguously, so that the backward pass computes each layer's weight gradient as a single
matrix product. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import heun, norm_mish
from .norm_mish import Gradients, Layer

# What the forward pass saves: nothing, enough for the gradients of z and rows, or enough for all gradients.
NOTHING, FROZEN, TRAINED = 0, 1, 2


class Call(NamedTuple):
    """The arguments of ``torch.ops.ttcfast.mlp_flow``, checked."""

    z: Tensor  # [B, D]
    rows: Tensor  # [B, U1]
    times: Tensor  # [K + 1, U1], or [K, U1] for Euler
    weights: list[Tensor]  # [U1, D], [U2, U1], ..., [D, Un]
    biases: list[Tensor]  # of all products but the first: [U2], ..., [D]
    scales: list[Tensor]  # of LayerNorm: [U1], ..., [Un]
    shifts: list[Tensor]
    method: str
    substeps: int
    group: int
    eps: float
    half: bool
    keep: int

    @property
    def evaluations(self) -> list[int]:
        """Return the index into ``times`` of every evaluation, in order."""
        if self.method == "euler":
            return list(range(self.substeps))
        return [k + second for k in range(self.substeps) for second in (0, 1)]

    @property
    def matmul_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else self.z.dtype

    @property
    def dt(self) -> float:
        return 1 / self.substeps

    def layer(self, index: int, time: int) -> Layer:
        """Return the parameters of the steps after product ``index``; the bias of the first is in ``times``."""
        bias = self.times[time] if index == 0 else self.biases[index - 1]
        return Layer(bias, self.scales[index], self.shifts[index], self.eps)

    def products(self) -> list[Tensor]:
        """Return the weights in the dtype of the products."""
        return [w.to(self.matmul_dtype) for w in self.weights]


class Kept(NamedTuple):
    """Tensors saved for the backward pass, each of leading shape [evaluations, B]."""

    products: list[Tensor]  # inputs of norm_mish, [E, B, U] per hidden layer
    stats: list[Tensor]  # per hidden layer, [E, B, 2]
    inputs: list[Tensor]  # inputs of the first product, [E, B, D], if weights are trained; otherwise empty

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
    count = len(call.evaluations) if call.keep != NOTHING else 1
    lead, widths = (count, call.z.shape[0]), [w.shape[0] for w in call.weights[:-1]]
    products = [call.z.new_empty((*lead, u), dtype=call.matmul_dtype) for u in widths]
    stats = [call.z.new_empty((*lead, 2)) for _ in widths]
    inputs = [call.z.new_empty((*lead, call.z.shape[1]), dtype=call.matmul_dtype)] if call.keep == TRAINED else []
    return Kept(products, stats, inputs)


class Forward:
    """Forward pass over the substeps."""

    def __init__(self, call: Call, pieces: Pieces) -> None:
        self.call, self.pieces, self.kept = call, pieces, buffers(call)
        self.weights = [w.t() for w in call.products()]
        # In bfloat16, the products' inputs are copies; otherwise states are written directly into the products' inputs.
        self.bias = call.biases[-1].to(call.matmul_dtype)
        self.active = [torch.empty_like(product[0]) for product in self.kept.products]
        self.at = 0

    def run(self) -> Tensor:
        call, z = self.call, self.call.z
        k1, k2 = (torch.empty_like(z, dtype=call.matmul_dtype) for _ in range(2))
        predicted = torch.empty_like(z)
        result = torch.empty_like(z)
        for k in range(call.substeps):
            self.velocity(z, k, k1)
            if call.method == "euler":
                self.pieces.update(z, k1, None, call.dt, 1.0, call.group, result)
            else:
                self.pieces.update(z, k1, None, call.dt, 1.0, call.group, predicted)
                self.velocity(predicted, k + 1, k2)
                self.pieces.update(z, k1, k2, 0.5 * call.dt, 1.0, call.group, result)
            z = result
        return result

    def velocity(self, z: Tensor, time: int, out: Tensor) -> None:
        """Fill ``out`` with the slope at ``z``, before group means are subtracted."""
        slot = self.at if self.call.keep != NOTHING else 0
        x = z
        if self.kept.inputs:
            x = self.kept.inputs[0][slot].copy_(z)
        elif self.call.half:
            x = z.to(torch.bfloat16)
        for index, (product, stats, active) in enumerate(zip(self.kept.products, self.kept.stats, self.active)):
            torch.mm(x, self.weights[index], out=product[slot])
            rows = self.call.rows if index == 0 else None
            self.pieces.norm_mish(product[slot], rows, self.call.layer(index, time), active, stats[slot])
            x = active
        torch.addmm(self.bias, x, self.weights[-1], out=out)
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
    """Backward pass over the substeps, last to first."""

    def __init__(self, call: Call, kept: Kept, pieces: Pieces) -> None:
        self.call, self.kept, self.pieces = call, kept, pieces
        self.trained, self.weights = call.keep == TRAINED, call.products()
        count = len(call.evaluations) if self.trained else 1
        self.of_products = [torch.empty((count, *p.shape[1:]), dtype=p.dtype, device=p.device) for p in kept.products]
        self.of_slopes = call.z.new_empty((count, *call.z.shape), dtype=call.matmul_dtype)
        self.active = [torch.empty_like(p) for p in kept.products] if self.trained else []
        self.scales = [torch.zeros_like(s) for s in call.scales] if self.trained else []
        self.shifts = [torch.zeros_like(s) for s in call.shifts] if self.trained else []
        self.rows = torch.zeros_like(call.rows)
        self.at = len(call.evaluations)

    def run(self, grad: Tensor) -> Result:
        """Run the pass from ``grad``, the gradient of the result, ``[B, D]``."""
        call, update, group = self.call, self.pieces.update, self.call.group
        grad = grad.clone()  # becomes the gradient of each substep's start in turn
        half_step = 0.5 * call.dt
        for k in reversed(range(call.substeps)):
            slope = self.slot(self.of_slopes)
            if call.method == "euler":
                update(None, grad, None, call.dt, 1.0, group, slope)
                grad += self.evaluation(k, slope)
                continue
            update(None, grad, None, half_step, 1.0, group, slope)
            of_predicted = self.evaluation(k + 1, slope)
            slope = self.slot(self.of_slopes)
            update(None, grad, of_predicted, half_step, 2.0, group, slope)
            grad += of_predicted
            grad += self.evaluation(k, slope)
        return self.result(grad)

    def slot(self, buffer: Tensor) -> Tensor:
        """Return the buffer of the next evaluation, the one before ``at``."""
        return buffer[self.at - 1 if self.trained else 0]

    def evaluation(self, time: int, slope: Tensor) -> Tensor:
        """Return the gradient of an evaluation's input from that of its slope."""
        grad, call = slope, self.call
        for index in reversed(range(len(self.kept.products))):
            grad = torch.mm(grad, self.weights[index + 1])
            out = Gradients(self.slot(self.of_products[index]))
            if self.trained:
                out = out._replace(
                    y=self.slot(self.active[index]), scale=torch.empty_like(call.scales[index]), shift=torch.empty_like(call.shifts[index])
                )
            product, stats = self.kept.products[index][self.at - 1], self.kept.stats[index][self.at - 1]
            rows = call.rows if index == 0 else None
            self.pieces.norm_mish_backward(grad, product, rows, call.layer(index, time), stats, out)
            if out.scale is not None and out.shift is not None:
                self.scales[index] += out.scale
                self.shifts[index] += out.shift
            grad = out.x
        if not self.trained:
            self.rows += grad
        self.at -= 1
        return torch.mm(grad, self.weights[0])

    def result(self, grad: Tensor) -> Result:
        call = self.call
        if not self.trained:
            return Result(grad, self.rows, call.times.new_empty(0), [], [], [], [])
        dtype = call.z.dtype
        outputs = [*self.of_products, self.of_slopes]
        per_time = self.of_products[0].sum(1, dtype=dtype)  # [E, U1]
        times = torch.zeros_like(call.times)
        if call.method == "euler":
            times += per_time
        else:
            times[:-1] += per_time[0::2]
            times[1:] += per_time[1::2]
        return Result(
            grad,
            self.of_products[0].sum(0, dtype=dtype),
            times,
            # All evaluations at once: one product per layer, whose inner size is E B.
            [torch.mm(o.flatten(0, 1).t(), i.flatten(0, 1)).to(dtype) for o, i in zip(outputs, [*self.kept.inputs, *self.active])],
            [o.sum((0, 1), dtype=dtype) for o in outputs[1:]],
            self.scales,
            self.shifts,
        )
