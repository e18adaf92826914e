"""Finds the axis of the states at every place of noise, by running the model on two and on four states.

Source: docs/design/decisions.md ("Row axes").
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ttcfast.runtime.errors import first_line
from ttcfast.runtime.turns import interruptible
from ttcfast.stochastic_sampling.keyed import Call, Draw, Trace, keyed_noise
from ttcfast.stochastic_sampling.row_axis import RowAxis
from ttcfast.stochastic_sampling.sites import Site

from .context import rows_of
from .low_precision import hooks_of
from .seeds import random_states, temp_seed

_TWO, _FOUR, _BACK = [0, 1], [2, 1, 3, 0], [3, 1]  # states of the two batches; positions of the first batch's states in the second
_ROWS = ((0, 1), (1, 2), (0, 4), (2, 7))  # (problem, candidate) of the four states
_STRONG = 0.5  # dropout rate in the checks; at low rates two masks may agree by chance
_UNKEYED = ("own", "training")  # kinds of sites that draw from the global streams, which their own warnings report
_COMPARED = 2**18  # entries of a tensor that are compared, per state
# Relative to the largest entry: the effect of other matrix shapes in a deep model. Mixed-up rows differ by far more.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_LIKE_ROUNDING = 0.01  # relative to the effect of the noise; smaller differences are rounding, even on devices that round more


@dataclass
class Found:
    """Result of a trace.

    Args:
        modules: Modules of the traced sites.
        axes: Axis of the states at each call of a site; None if the model could not be traced.
        warning: Warning to issue once; None for none.
        keyed: Whether all noise is keyed: the model drew nothing from the global streams, the states are found at every site, and a
            candidate is the same in another batch.
        hooks: ``hooks_of`` the model that was traced.
    """

    modules: tuple[nn.Module | None, ...]
    axes: dict[Call, RowAxis | None] | None
    warning: str | None = None
    keyed: bool = False
    hooks: tuple[int, ...] = ()


def row_trace(
    model: nn.Module,
    sites: Sequence[Site],
    state: Tensor,
    unpack: Callable[[Any], Tensor],
    precision: torch.dtype | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> Found:
    """Finds the axis of the states at each site, and whether a candidate is the same in another batch.

    Noise-free forwards of states (A, B) and (C, B, D, A) show each site's tensor for two numbers of states: the axis that grows holds them.
    If it has several entries per state, the folding order is the one in which A's and B's entries are equal in both batches. A tensor that
    does not grow is shared by all states; it gets one copy per state if the model accepts that. Then both batches run with noise: A and B
    must give the same results. If several readings remain (entries of all states are equal, as behind zero weights), the first one that
    passes is taken.

    It costs 12 rows of a forward, 18 if states are folded, and more if readings remain. The forwards run on a copy of the model that shares
    its tensors, so that attributes set by a forward stay there; a model that cannot be copied is run itself.

    Args:
        model: Model as it will be called, under the caller's autocast.
        sites: Sites of noise; those that cannot be keyed or have no axis are excluded from the check.
        state: One model input, without the axis of states.
        unpack: Extracts the tensor from what the model returns.
        precision: Precision of the model's arithmetic, if it differs from the dtype of its outputs.
        given: Keyword arguments of the model for some states, ``[N, ...]`` each.

    Returns:
        Axes of the sites, and a warning if candidates depend on each other.
    """
    modules, name = tuple(site.module for site in sites), type(model).__name__
    with torch.inference_mode(False), torch.no_grad():
        try:
            tracing = _Tracing(*_copied(model, sites), _four_of(state.clone()), unpack, precision, given or {})
            axes, reason = tracing.run()
        except Exception as error:  # the model's own errors recur in the call itself, before the warning
            what = f"{name} could not be run on {len(_TWO)} and {len(_FOUR)} states ({type(error).__name__}: {first_line(error)})"
            return Found(modules, None, f"{what}, so which entries belong to which state is told by the sizes of axes alone")
    reports = [f"the candidates of {name} depend on the others in their batch, and so on chunks and order: {reason}"] if reason else []
    common = [site.name for site in sites if any(a and a.rows == "common" for (n, _), a in axes.items() if n == site.number)]
    if common:
        reports.append(
            f"all candidates of a step have the same noise at {', '.join(map(repr, common))} of {name}: the tensors there are the same for "
            "all states, and the model takes none with an entry for each"
        )
    keyed = not reason and not tracing.drew and None not in axes.values() and all(site.kind not in _UNKEYED for site in sites)
    return Found(modules, axes, "; ".join(reports) or None, keyed, hooks_of(model))


class _Tracing:
    """Traces one model with its sites on four states."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        states: Tensor,
        unpack: Callable[[Any], Tensor],
        precision: torch.dtype | None,
        given: Mapping[str, Tensor],
    ) -> None:
        self.model, self.states, self.unpack, self.precision = model, states, unpack, precision
        self.given = {name: value[[i % len(value) for i in range(len(states))]] for name, value in given.items()}
        self.sites = [replace(s, amount=max(s.amount, _STRONG if s.is_dropout else 1.0)) for s in sites if s.module is not None]
        self.axes: dict[Call, RowAxis | None] = {}
        self.drew = False  # whether a forward drew from the global streams

    def run(self) -> tuple[dict[Call, RowAxis | None], str | None]:
        """Return the axes, and the reason if candidates depend on each other."""
        small, large = _Shapes(), _Shapes()
        two, four = self._forward(_TWO, trace=small), self._forward(_FOUR, trace=large)
        readings = {call: self._readings(call, shapes, large.get(call)) for call, shapes in small.items()}
        self._unfold(readings)
        readings = {call: [replace(a, ndim=len(small[call][0])) for a in each] for call, each in readings.items()}
        self.axes = {call: each[0] if each else None for call, each in readings.items()}
        if self._differ(four[_BACK], two, two[0] - two[1]):
            return self.axes, self._mixing(four)
        unkeyed = {number for (number, _), each in readings.items() if not each}
        keyed = [s for s in self.sites if s.kind not in _UNKEYED and s.number not in unkeyed]
        if not keyed or self._agree(keyed, two):
            return self.axes, None
        for call, each in readings.items():
            alone = [s for s in keyed if s.number == call[0]]
            for reading in each if len(each) > 1 and alone else ():
                self.axes[call] = reading
                if self._agree(alone, two):
                    break
        if self._agree(keyed, two):
            return self.axes, None
        guilty = [s.name for s in keyed if not self._agree([s], two)]
        return self.axes, f"the noise at {', '.join(map(repr, guilty)) or 'its sites'} gets from one state to others"

    def _forward(self, order: list[int], sites: Sequence[Site] = (), *, trace: Trace | None = None, seed: int | None = None) -> Tensor:
        """Return the model's output with the noise of ``sites``, or without noise if ``trace`` receives the inputs of every site."""
        draw = Draw.of(0, 0, torch.tensor([_ROWS[i] for i in order], device=self.states.device))
        draw.axes, draw.trace = self.axes, trace
        batch = self.states[order]
        # Another seed for another batch, so that draws from torch's own streams show as differences.
        seed, acting = len(order) if seed is None else seed, sites if trace is None else self.sites
        with temp_seed(seed), keyed_noise(self.model, acting, draw), interruptible():
            before = random_states()
            out = self.unpack(self.model(batch, **rows_of(self.given, order))).clone()
            self.drew |= random_states() != before
        return out

    def _agree(self, sites: Sequence[Site], still: Tensor) -> bool:
        """Tell whether two states' candidates are equal in both batches with the noise of these sites."""
        try:
            two, four = (self._forward(each, sites) for each in (_TWO, _FOUR))
        except (RuntimeError, ValueError, TypeError, IndexError):  # the model does not accept this reading
            return False
        return two.shape == still.shape and four.shape[1:] == still.shape[1:] and not self._differ(four[_BACK], two, two - still)

    def _differ(self, a: Tensor, b: Tensor, effect: Tensor) -> bool:
        """Tell whether results differ by more than rounding, relative to the effect of the noise."""
        if _close(a, b, self.precision):
            return False
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return True
        # Entries that are not finite are ignored: models of the ocean mask land.
        apart, most = (torch.where(x.isfinite(), x.abs(), 0.0).max() for x in (a - b, effect))
        return not bool(apart <= _LIKE_ROUNDING * most)

    def _readings(self, call: Call, two: list[torch.Size], four: list[torch.Size] | None) -> list[RowAxis]:
        """Return possible readings of a site's call, the likeliest first; none if no single axis holds the states."""
        if not two or not four or len(two[0]) != len(four[0]):
            return []
        small, large = two[0], four[0]
        grown = [d for d in range(len(small)) if small[d] != large[d]]
        (module,) = {s.module for s in self.sites if s.number == call[0]}
        if isinstance(module, nn.MultiheadAttention) and len(two) > 1:  # its batch axis is declared, but may hold something else
            batch = 0 if module.batch_first else 1
            if grown and grown != [batch]:
                return []
            if not grown:
                return [RowAxis(batch, rows="widened"), RowAxis(rows="common")] if small[batch] == 1 else []
        if not grown:
            wide = [RowAxis(d, rows="widened") for d, size in enumerate(small) if size == 1]
            new = [] if wide and wide[0].axis == 0 else [RowAxis(rows="new")]
            return [*wide, *new, RowAxis(rows="common")]
        (axis, *more), n, m = grown, len(_TWO), len(_FOUR)
        if more or small[axis] % n or small[axis] * m != large[axis] * n:
            return []
        each = small[axis] // n
        ways = [RowAxis(axis, outer, each // outer) for outer in range(1, each + 1) if each % outer == 0]
        return [ways[0], *reversed(ways[1:])]  # states outermost, then innermost, then in between

    def _unfold(self, readings: dict[Call, list[RowAxis]]) -> None:
        """Keep the folding orders in which the states that both batches share have equal entries."""
        folded = {call: each[0].axis for call, each in readings.items() if len(each) > 1 and each[0].rows == "held"}
        if not folded:
            return
        small, large = _Values(folded, len(_TWO)), _Values(folded, len(_FOUR))
        for order, values in ((_TWO, small), (_FOUR, large)):
            self._forward(order, trace=values)
        for call in folded:
            readings[call] = _same_in_both(readings[call], small[call], large[call], self.precision)

    def _mixing(self, four: Tensor) -> str:
        """Return the reason why a state's noise-free result depends on the others."""
        if not torch.allclose(self._forward(_FOUR, seed=0), four, rtol=0.0, atol=0.0, equal_nan=True):
            return "it draws noise of its own, which no key reaches (functional dropout, or random numbers in a forward)"
        named = self.model.named_modules()
        norms = [name for name, m in named if isinstance(m, _BatchNorm) and m.running_mean is None]
        if norms:
            return f"BatchNorm without running statistics normalises by the batch (module {norms[0]!r}); use track_running_stats=True"
        return "its forward mixes the states of a batch"


class _Shapes(dict[Call, list[torch.Size]]):
    """A trace that keeps the shapes of each call; none for calls that cannot be keyed."""

    def __call__(self, call: Call, given: Sequence[Tensor] | None) -> None:
        self[call] = [t.shape for t in given or ()]


class _Values(dict[Call, list[Tensor]]):
    """A trace that keeps some entries of the tensors at some calls, ``[n, entries]``, with n along the axis given for the call.

    They are the same entries whatever the number of states.
    """

    def __init__(self, axes: dict[Call, int], states: int) -> None:
        super().__init__()
        self._axes, self._states = axes, states

    def __call__(self, call: Call, given: Sequence[Tensor] | None) -> None:
        if given is None or call not in self._axes:
            return
        axis, self[call] = self._axes[call], []
        for t in given:
            if t.ndim > axis and t.shape[axis] == given[0].shape[axis]:
                flat = t.movedim(axis, 0).flatten(1) if t.ndim > 1 else t.unsqueeze(1)
                step = max(1, math.ceil(flat.numel() // self._states / _COMPARED))
                self[call].append(flat[:, ::step].clone())


def _same_in_both(ways: list[RowAxis], two: list[Tensor], four: list[Tensor], precision: torch.dtype | None) -> list[RowAxis]:
    """Return the folding orders in which two states' entries are equal in both batches; the closest if rounding leaves none."""

    def both(way: RowAxis) -> Iterator[tuple[Tensor, Tensor]]:
        for a, b in zip(two, four):
            a, b = (t.unflatten(0, (way.outer, -1, way.inner)) for t in (a, b))
            yield a, b[:, _BACK]

    def error(way: RowAxis) -> float:
        errors = [float((a - b).abs().max()) for a, b in both(way)]
        return max(math.inf if math.isnan(e) else e for e in errors)

    return [way for way in ways if all(_close(a, b, precision) for a, b in both(way))] or [min(ways, key=error)]


def _close(a: Tensor, b: Tensor, precision: torch.dtype | None) -> bool:
    """Tell whether two tensors are equal up to rounding, with NaN and infinities in the same places."""
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    finite = b[b.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=size * _ROUNDING[precision or a.dtype], equal_nan=True)


def _four_of(state: Tensor) -> Tensor:
    """Return four different states similar to one, even if that is uniform or not finite."""
    state = state.nan_to_num(0.0, 0.0, 0.0)
    count = torch.arange(state.numel(), device=state.device)
    waves = [(k * count).sin().view_as(state).to(state.dtype) for k in range(len(_FOUR))]
    return torch.stack([(1 - 0.1 * k) * state.roll(k, -1) + 0.1 * k * wave for k, wave in enumerate(waves)])


def _copied(model: nn.Module, sites: Sequence[Site]) -> tuple[nn.Module, Sequence[Site]]:
    """Return a copy of the model around the same tensors, and its sites; the model itself if it cannot be copied."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        other = copy.deepcopy(model, shared)
        modules = dict(other.named_modules())
        return other, [s if s.module is None else replace(s, module=modules[s.name]) for s in sites]
    except Exception:  # locks, files, or tensors with autograd history on a module
        return model, sites
