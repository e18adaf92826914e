"""Per-layer rules of ``GhostNorms``: what each kind of layer contributes to the gradient norms of the microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_NUMBERS = 1 << 24  # in a temporary; microbatches are processed in groups that stay below it


@dataclass(frozen=True)
class Split:
    """Splits activations into microbatches; ``verify`` asks the layers to check what they measured against ``.grad``."""

    samples: int
    microbatches: int
    batch_dim: int
    verify: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Reshape ``[..., D]`` to the rows of each microbatch, ``[M, R, D]``; 16-bit floats become float32."""
        x = x.detach().movedim(self.batch_dim, 0)
        return _wide(x.reshape(self.microbatches, -1, x.shape[-1]))

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether an activation ``[..., D]`` of this shape has the batch at ``batch_dim``."""
        axes = len(shape)
        return axes >= 2 and -axes <= self.batch_dim < axes - 1 and self.batch_dim != -1 and shape[self.batch_dim] == self.samples


# Layer, parameter, sum of its contributions, sum of their magnitudes, the same projection of .grad, factor by which terms exceed sums.
Probe = tuple["Layer", str, Tensor, Tensor, Tensor, Tensor]


class Layer:
    """Gathers the norms of one module: the backward calls ``take`` with the input and output gradient of each use."""

    def __init__(self, name: str, module: Any, split: Split) -> None:
        self.name, self.module, self.split = name, module, split
        self.trained = {n for n, p in module.named_parameters(recurse=False) if p.requires_grad}
        self.feature_axes = 1
        self.uses = 0
        self.dtype = torch.float32
        self.norms: Tensor | None = None  # [M] float64
        self.found: dict[str, tuple[Tensor, Tensor]] = {}  # by parameter: sum of the projected contributions, sum of their magnitudes
        self.offset: dict[str, Tensor] = {}  # by parameter, where contributions are differences of larger numbers

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Forward hook: have ``take`` called when the gradient of ``output`` arrives."""
        if not output.requires_grad:
            return
        if not self.split.fits((*output.shape[: output.ndim - self.feature_axes], 1)):
            raise ValueError(
                f"{self.name} ({type(module).__name__}) gives {tuple(output.shape)}, in which axis {self.split.batch_dim} is not the batch "
                f"of {self.split.samples}; set the batch axis of activations, or use method='loop'"
            )
        x = args[0] if args else next(iter(kwargs.values()))
        self.uses += 1
        self.dtype = output.dtype
        output.register_hook(lambda g: self.take(x, g))

    def take(self, x: Tensor, g: Tensor) -> None:
        """Take one use's input ``x`` and output gradient ``g``."""
        raise NotImplementedError

    def measure(self) -> None:
        """Add the squared norms of everything taken so far and drop it; called at the latest when the backward is done."""
        raise NotImplementedError

    def add(self, squares: Tensor) -> None:
        """Add squared norms ``[M]``."""
        self.norms = squares if self.norms is None else self.norms + squares

    def probe(self, parameter: str, terms: Tensor) -> None:
        """Record projected contributions to the gradient of ``parameter``."""
        total, size = terms.sum(dtype=torch.float64), terms.abs().sum(dtype=torch.float64)
        before = self.found.get(parameter)
        self.found[parameter] = (total, size) if before is None else (before[0] + total, before[1] + size)

    def probes(self) -> Iterator[Probe]:
        """Yield, for each parameter, its contributions and its ``.grad``, projected on the same direction."""
        for parameter in sorted(self.trained):
            weight = getattr(self.module, parameter)
            zero = torch.zeros((), dtype=torch.float64, device=weight.device)
            total, size = self.found.get(parameter, (zero, zero))
            actual = zero if weight.grad is None else self.projected(_wide(weight.grad))
            yield self, parameter, total, size, actual, self.offset.get(parameter, zero)

    def projected(self, grad: Tensor) -> Tensor:
        """Project the whole gradient of a parameter, as the contributions are."""
        while grad.ndim:
            grad = _along(grad)
        return grad


class Linear(Layer):
    """Rule for weight [out, in] and bias [out]; a bias is a feature that is always 1 and adds 1 to each product of inputs."""

    def __init__(self, name: str, module: nn.Linear, split: Split) -> None:
        super().__init__(name, module, split)
        self.pairs: list[tuple[Tensor, Tensor]] = []  # of each use, [M, R, in] and [M, R, out]
        self.weight, self.bias = "weight" in self.trained, "bias" in self.trained

    def take(self, x: Tensor, g: Tensor) -> None:
        pair = self.split(x), self.split(g)
        self.pairs.append(pair)
        if self.split.verify:
            along = _along(pair[1])  # [M, R]
            if self.weight:
                self.probe("weight", along * _along(pair[0]))
            if self.bias:
                self.probe("bias", along)
        if self.uses == 1:
            self.measure()

    def measure(self) -> None:
        if not self.pairs:
            return
        x, g = self.pairs[0]
        rows, inputs, outputs = sum(x.shape[1] for x, _ in self.pairs), x.shape[2], g.shape[2]
        if not self.weight:
            self.add(_square_norms(torch.stack([g.sum(1) for _, g in self.pairs]).sum(0)))
        elif rows == 1:
            self.add((_square_norms(x[:, 0]) + self.bias) * _square_norms(g[:, 0]))
        elif rows * (inputs + outputs) < inputs * outputs:
            x, g = (self.pairs[0][i] if len(self.pairs) == 1 else torch.cat([pair[i] for pair in self.pairs], 1) for i in (0, 1))
            self.add(_in_groups(self.split.microbatches, rows * rows, lambda m: self._gram(x[m], g[m])))
        else:
            self.add(_in_groups(self.split.microbatches, inputs * outputs, self._formed))
        self.pairs.clear()

    def _gram(self, x: Tensor, g: Tensor) -> Tensor:
        (x, of_x), (g, of_g) = _near_one(x, 1e-3, 1.0 if self.bias else 0.0), _near_one(g, 1e-15)
        products = torch.bmm(x, x.transpose(1, 2))  # [m, R, R]
        if self.bias:
            products += of_x.square().reciprocal()
        sums = products.mul_(torch.bmm(g, g.transpose(1, 2))).sum((1, 2), dtype=torch.float64)
        return sums * (of_x.double() * of_g.double()).square().flatten()

    def _formed(self, m: slice) -> Tensor:
        total, bias = None, None
        for x, g in self.pairs:
            transposed = g[m].transpose(1, 2)
            total = torch.bmm(transposed, x[m]) if total is None else torch.baddbmm(total, transposed, x[m])
            if self.bias:
                bias = g[m].sum(1) if bias is None else bias + g[m].sum(1)
        assert total is not None
        squares = _square_norms(total.flatten(1))
        return squares if bias is None else squares + _square_norms(bias)


class LayerNorm(Layer):
    """Rule for weight and bias of the normalised shape; their gradients per microbatch are as small as activations and are formed."""

    def __init__(self, name: str, module: nn.LayerNorm, split: Split) -> None:
        super().__init__(name, module, split)
        self.feature_axes = len(module.normalized_shape)
        self.sums: dict[str, Tensor] = {}  # by parameter, [M, D]

    def take(self, x: Tensor, g: Tensor) -> None:
        g = self.split(g.flatten(-self.feature_axes))
        if "weight" in self.trained:
            rows = self.split(x.flatten(-self.feature_axes))
            if self.split.verify:
                self._see_offset(rows)
            self._add("weight", functional.layer_norm(rows, rows.shape[-1:], eps=self.module.eps).mul_(g))
        if "bias" in self.trained:
            self._add("bias", g)

    def _see_offset(self, rows: Tensor) -> None:
        """Record ``|mean| rstd``: torch normalises as ``x rstd - mean rstd``, here and in its backward, and rounds in proportion."""
        variance, mean = torch.var_mean(rows, -1, correction=0)
        found = (mean.abs() * (variance + self.module.eps).rsqrt()).amax().double()
        self.offset["weight"] = torch.maximum(self.offset["weight"], found) if "weight" in self.offset else found

    def _add(self, parameter: str, rows: Tensor) -> None:
        if self.split.verify:
            self.probe(parameter, _along(rows))
        total = rows.sum(1) if rows.shape[1] > 1 else rows[:, 0]
        self.sums[parameter] = self.sums[parameter] + total if parameter in self.sums else total
        if self.uses == 1:
            self.measure()

    def measure(self) -> None:
        while self.sums:
            self.add(_square_norms(self.sums.popitem()[1]))

    def projected(self, grad: Tensor) -> Tensor:
        return super().projected(grad.flatten())


class Embedding(Layer):
    """Rule for weight [numbers, D]; rows that a microbatch looked up several times are summed before the norm is taken."""

    def __init__(self, name: str, module: nn.Embedding, split: Split) -> None:
        super().__init__(name, module, split)
        self.pairs: list[tuple[Tensor, Tensor]] = []  # of each use, [M, R] and [M, R, D]

    def take(self, x: Tensor, g: Tensor) -> None:
        index, g = self.split(x.unsqueeze(-1))[..., 0], self.split(g)
        if self.module.padding_idx is not None:
            g = torch.where((index != self.module.padding_idx).unsqueeze(-1), g, 0.0)
        self.pairs.append((index, g))
        if self.split.verify:
            self.probe("weight", _along(g))

    def projected(self, grad: Tensor) -> Tensor:
        return _along(grad).sum(dtype=torch.float64)

    def measure(self) -> None:
        if not self.pairs:
            return
        index, g = (torch.cat([pair[i] for pair in self.pairs], 1) for i in (0, 1))
        numbers, m = self.module.num_embeddings, self.split.microbatches
        key = torch.arange(m, device=index.device).unsqueeze(1) * numbers + index  # [M, R]
        looked_up, place = key.flatten().unique(return_inverse=True)
        sums = g.new_zeros(len(looked_up), g.shape[-1]).index_add_(0, place, g.flatten(0, 1))
        squares = torch.zeros(m, dtype=torch.float64, device=g.device)
        self.add(squares.index_add_(0, looked_up // numbers, _square_norms(sums)))
        self.pairs.clear()


class Broadcast:
    """A parameter that is expanded to ``[B, *shape]`` while it is measured."""

    def __init__(self, name: str, owner: nn.Module, attribute: str, split: Split) -> None:
        if type(owner) in RULES:
            raise ValueError(f"broadcast names {name!r}, which belongs to a {type(owner).__name__}; it is measured without being named")
        self.owner, self.attribute, self.split = owner, attribute, split
        self.parameter: nn.Parameter = getattr(owner, attribute)
        self.norms: Tensor | None = None

    def put(self) -> None:
        """Expand the parameter on its module."""
        if self.parameter.requires_grad:
            beside = self.parameter.expand(self.split.samples, *self.parameter.shape)
            beside.register_hook(self.take)
            self.owner.__dict__[self.attribute] = beside  # found before the parameter of that name

    def remove(self) -> None:
        """Give the module its parameter back."""
        self.owner.__dict__.pop(self.attribute, None)

    def take(self, g: Tensor) -> None:
        """Take the gradient ``[B, *shape]``."""
        rows = _wide(g.detach()).reshape(self.split.microbatches, self.split.samples // self.split.microbatches, -1)
        self.norms = _square_norms(rows.sum(1))


RULES: dict[type[nn.Module], type[Layer]] = {nn.Linear: Linear, nn.LayerNorm: LayerNorm, nn.Embedding: Embedding}


def _in_groups(microbatches: int, numbers: int, squares: Callable[[slice], Tensor]) -> Tensor:
    """Compute ``[M]`` in groups of microbatches that keep temporaries of ``numbers`` numbers per microbatch small."""
    step = max(1, MOST_NUMBERS // max(1, numbers))
    return torch.cat([squares(slice(start, start + step)) for start in range(0, microbatches, step)])


def _square_norms(rows: Tensor) -> Tensor:
    """Return the squared norms of ``[n, D]``, ``[n]`` float64, whatever the scale of the rows."""
    if rows.is_cpu and _within(norms := torch.linalg.vector_norm(rows, dim=1), 1e-15, 1e18):  # one pass that stores no squares
        return norms.double().square()
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()


def _near_one(rows: Tensor, low: float, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Divide ``[m, R, D]`` by a power of two per microbatch, ``[m, 1, 1]``, to keep Gram matrices in float32's range; return both.

    The power brings the largest magnitude, or ``least`` if that is larger, near 1; it is 1 where all norms lie between ``low`` and 1e9.
    """
    if rows.is_cpu and _within(torch.linalg.vector_norm(rows, dim=(1, 2)), low, 1e9):
        return rows, rows.new_ones(())
    exponent = torch.frexp(rows.abs().amax((1, 2), keepdim=True).clamp_min(least)).exponent.clamp(-126, 126)
    scale = torch.ldexp(torch.ones_like(rows[:, :1, :1]), exponent)
    return rows / scale, scale


def _within(norms: Tensor, low: float, high: float) -> bool:
    """Return whether all norms lie between ``low`` and ``high``; asked on the CPU alone, where reading values waits for no device."""
    return bool(((norms > low) & (norms < high)).all())


def _wide(x: Tensor) -> Tensor:
    """Return ``x``, 16-bit floats as float32."""
    return x.float() if x.is_floating_point() and x.element_size() == 2 else x


def _along(x: Tensor) -> Tensor:
    """Project ``[..., D]`` on a fixed vector without structure, drawn from no generator; ``[...]``."""
    numbers = torch.arange(1, x.shape[-1] + 1, dtype=torch.float64, device=x.device)
    return x @ torch.cos(numbers.square()).to(x.dtype)
