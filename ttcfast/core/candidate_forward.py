"""How a surrogate calls its model for candidates: what they have in common done once, compiled or in low precision where asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.runtime.turns import in_turn, interruptible
from ttcfast.stochastic_sampling.keyed import Draw, keyed_noise
from ttcfast.stochastic_sampling.sites import INPUT, Site

from .compiled import CompiledCall, compiled_call
from .low_precision import LowPrecision, storage_of, versions_of
from .row_trace import Found, row_trace
from .shared_prefix import CHECKED_ROWS, OtherPathError, SharedPrefix, Start

logger = logging.getLogger(__name__)

Unpack = Callable[[Any], Tensor]


class CandidateForward:
    """Calls a model for B candidates of each of N problems, noise acting at its sites, and for the deterministic step.

    Remembers, for each layout of sites and inputs, where the states are at the sites (``row_trace``), what can be shared
    (``SharedPrefix``) and, with ``compile``, the compiled call of each size. Copies and pickles of it remember nothing. Calls are turns
    (``ttcfast.runtime.turns``), so that threads neither meet in the model nor in what is remembered.

    With ``dtype`` candidates are computed in low precision (``LowPrecision``) and corrected by the deterministic step, which is computed
    both ways: ``low(candidate) + full(deterministic) - low(deterministic)``. The error that all candidates of a problem have in common,
    that of rounded weights above all, drops out. It is larger than the differences between candidates' conservation residuals, so that
    without the correction choices by ARM were near random (shipped ViT, bfloat16, 24 groups of 8: mean regret 8 % of the spread, 68 % at
    worst; with it 0.1 and 2.3 %). It costs one low and one full forward more per problem; the full one is shared with ``deterministic``
    when that was asked for the same states just before, as the controllers do.

    Args:
        model: called under ``keyed_noise``, which puts it in evaluation.
        share_prefix: run what precedes the first noise once per problem, where that does not change the outcome; the log says whether.
        compile: ``False``, or ``True`` or a mode of torch.compile.
        dtype: of matrix products for candidates; None for the model's own.
    """

    def __init__(
        self, model: nn.Module, *, share_prefix: bool = True, compile: bool | str = False, dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.share_prefix, self.compile, self.dtype = model, share_prefix, compile, dtype
        self._low = None if dtype is None else LowPrecision(model, dtype)
        self._prefixes: dict[tuple[Any, ...], SharedPrefix] = {}
        self._traces: dict[tuple[Any, ...], Found] = {}
        self._compiled: dict[tuple[Any, ...], CompiledCall] = {}
        self._last: tuple[Any, ...] | None = None  # inputs, weights and outcome of the last deterministic step

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (self.model, self.share_prefix, self.compile, self.dtype)

    def of(self, model: nn.Module) -> CandidateForward:
        """The same for another model; nothing is remembered."""
        return _make(model, *self.__reduce__()[1][1:])

    @in_turn
    def __call__(self, encoded: Tensor, sites: Sequence[Site], draw: Draw, unpack: Unpack, *, compile: bool = True) -> Tensor:
        """What the model says to ``[N * B, ...]``, problem-major, for inputs ``[N, ...]`` and a fresh ``draw`` of ``N * B`` rows.

        Args:
            unpack: takes the tensor out of what the model returns.
            compile: False calls the model itself this once, whatever was asked for.

        Raises:
            CompileError: the model cannot be compiled.
        """
        found = self._traced(encoded, sites, unpack)
        draw.axes = found.axes
        out = self._candidates(encoded, sites, draw, unpack, compile and bool(self.compile))
        if found.warning is not None:  # not before the call has shown that the model can be called
            warnings.warn(found.warning, RuntimeWarning, stacklevel=7)
            found.warning = None
        return out

    def _candidates(self, encoded: Tensor, sites: Sequence[Site], draw: Draw, unpack: Unpack, compile: bool) -> Tensor:
        if self._low is None:
            return unpack(self._called(encoded, sites, draw, compile))
        out = unpack(self._called(encoded, self._low.sites(sites), draw, compile, low=True))
        still = Draw(_rows_of(encoded), draw.stream)
        full, low = self.deterministic(encoded, unpack, compile=compile), unpack(self._called(encoded, [], still, compile, low=True))
        difference = full - low.to(full.dtype)
        difference = torch.where(difference.isfinite(), difference, 0.0)  # a step that blows up corrects nothing
        return out.to(full.dtype) + difference.repeat_interleave(len(out) // len(full), 0)

    @in_turn
    def deterministic(self, encoded: Tensor, unpack: Unpack, *, compile: bool = True) -> Tensor:
        """What the model says to ``[N, ...]`` without noise, in its own precision."""
        weights = None if self._low is None else (storage_of(self.model), versions_of(self.model))
        if self._last is not None and self._last[0] == weights and _same(self._last[1], encoded):
            return self._last[2].clone()
        out = unpack(self._called(encoded, [], Draw.of(0, 0, _rows_of(encoded)), compile and bool(self.compile)))
        if self._low is not None:
            self._last = (weights, encoded.clone(), out.clone())
        return out

    def _traced(self, encoded: Tensor, sites: Sequence[Site], unpack: Unpack) -> Found:
        layout = (tuple((s.name, s.kind) for s in sites), encoded.shape[1:], encoded.dtype, encoded.device, _autocast(encoded))
        found, modules = self._traces.get(layout), tuple(s.module for s in sites)
        if found is None or found.modules != modules:
            found = self._traces[layout] = row_trace(self.model, sites, encoded[0], unpack, _autocast(encoded))
        return found

    @in_turn
    def prefix(self, encoded: Tensor, sites: Sequence[Site], draw: Draw, *, low: bool = False) -> SharedPrefix | None:
        """What candidates of inputs like ``encoded`` share; None where nothing is shared."""
        if not self.share_prefix or not sites or any(s.kind == INPUT for s in sites):
            return None
        if len(draw.rows) == len(encoded) or len(draw.rows) < CHECKED_ROWS:  # so few that the check would be the largest call
            return None
        layout = (low, tuple((s.name, s.kind) for s in sites), encoded.shape[1:], encoded.dtype, encoded.device, _autocast(encoded))
        prefix = self._prefixes.get(layout)
        if prefix is None or prefix.outdated or prefix.model is not self._model(low):
            finite = encoded.flatten(1).isfinite().all(1)
            if not finite.any():  # NaN equals NaN wherever rows are put, so that nothing would be found out
                return None
            prefix = self._prefixes[layout] = self._checked(encoded[finite][0], sites, draw, low)
        return prefix if prefix.reason is None else None

    def _model(self, low: bool) -> nn.Module:
        return self._low.current if low and self._low is not None else self.model

    def _called(self, encoded: Tensor, sites: Sequence[Site], draw: Draw, compile: bool, *, low: bool = False) -> Any:
        model, prefix = self._model(low), self.prefix(encoded, sites, draw, low=low)
        if not compile:
            return self._run(model, prefix, encoded, sites, draw, low)
        noise = tuple((s.name, s.kind, s.amount) for s in sites)
        where = (low, encoded.shape, encoded.dtype, encoded.device, _autocast(encoded), len(draw.rows), draw.antithetic, noise)
        # Values may change under a compiled call, but tensors that are put in the place of others, and new hooks, are not seen by it.
        held = (storage_of(model), tuple(len(m._forward_hooks) for m in model.modules()))
        if (call := self._compiled.get(where)) is None or call.held != held:

            def run(x: Tensor, rows: Tensor, stream: Tensor) -> Any:
                return self._run(model, prefix, x, sites, Draw(rows, stream, draw.antithetic, axes=draw.axes), low)

            call = self._compiled[where] = compiled_call(
                run,
                (encoded, draw.rows, draw.stream),
                model=model,
                mode="default" if self.compile is True else str(self.compile),
                held=held,
            )
        with interruptible():
            return call(encoded, draw.rows, draw.stream)

    def _checked(self, state: Tensor, sites: Sequence[Site], draw: Draw, low: bool) -> SharedPrefix:
        model, starts = self._model(low), [Start(s.module, s.kind in ("after", "latent")) for s in sites if s.module is not None]
        prefix = SharedPrefix(model, starts, precision=self.dtype if low else _autocast(state))
        wave = torch.arange(state.numel(), device=state.device).sin().view_as(state).to(state.dtype)
        pair = torch.stack([state, 0.9 * state.roll(1, -1) + 0.1 * wave])  # another state of the same kind, also where this one is uniform
        rows = torch.cartesian_prod(torch.arange(2), torch.arange(2)).to(draw.rows.device)
        with warnings.catch_warnings(), self._products(state, low):
            warnings.simplefilter("ignore")  # what cannot be keyed is said when candidates are made
            prefix.check(pair, lambda: keyed_noise(model, sites, Draw(rows, draw.stream, draw.antithetic, axes=draw.axes)))
        name = type(model).__name__
        if prefix.reason is None:
            logger.info("%s: candidates share what precedes the first noise: %s", name, ", ".join(prefix.shared))
        else:
            logger.info("%s: candidates share nothing, since %s", name, prefix.reason)
        return prefix

    def _run(self, model: nn.Module, prefix: SharedPrefix | None, encoded: Tensor, sites: Sequence[Site], draw: Draw, low: bool) -> Any:
        count = len(draw.rows) // len(encoded)
        with self._products(encoded, low):
            if prefix is not None and prefix.reason is None:
                try:
                    with keyed_noise(model, sites, draw):
                        return prefix(encoded, count)
                except OtherPathError as error:  # seen before anything is returned: the model is called as if nothing were shared
                    logger.warning("%s", error)
                    prefix.reason = str(error)
                    draw.start(draw.rows, draw.stream)
            batch = _copies(encoded, count, sites, draw)
            with keyed_noise(model, sites, draw), interruptible():
                return model(batch)

    def _products(self, encoded: Tensor, low: bool) -> ExitStack:
        stack = ExitStack()
        if low and self._low is not None:
            stack.enter_context(self._low.products(encoded.device))
        return stack


def _make(model: nn.Module, share_prefix: bool, compile: bool | str, dtype: torch.dtype | None) -> CandidateForward:
    return CandidateForward(model, share_prefix=share_prefix, compile=compile, dtype=dtype)


def _autocast(encoded: Tensor) -> torch.dtype | None:
    """The dtype of the caller's autocast, if that is on."""
    device = encoded.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _rows_of(encoded: Tensor) -> Tensor:
    return torch.zeros(len(encoded), 2, dtype=torch.int64, device=encoded.device)


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def _copies(encoded: Tensor, count: int, sites: Sequence[Site], draw: Draw) -> Tensor:
    """Model inputs ``[N, ...]`` for each of their candidates, ``[N * count, ...]``, with the noise of the input's site if there is one."""
    for site in sites:
        if site.kind == INPUT:
            return draw.copies(encoded, count, site.amount, draw.next_number(site)).flatten(0, 1)
    return encoded.repeat_interleave(count, 0)
