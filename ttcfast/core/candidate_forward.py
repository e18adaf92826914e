"""Calls a surrogate's model for candidates: shared work is done once, and on request compiled or in low precision."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
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
    """Calls a model for B candidates of each of N problems, with noise at its sites, and for the deterministic step.

    For each layout of sites and inputs it caches the axis of the states at each site (``row_trace``), the work that can be shared
    (``SharedPrefix``) and, with ``compile``, the compiled call for each size. Copies and pickles start with empty caches. Calls are turns
    (``ttcfast.runtime.turns``), so that threads share neither the model nor the caches at the same time.

    With ``dtype``, candidates are computed in low precision (``LowPrecision``) and corrected by the deterministic step, which is computed
    both ways: ``low(candidate) + full(deterministic) - low(deterministic)``. This cancels the error that all candidates of a problem have
    in common, above all that of rounded weights, which exceeds the differences between the candidates' conservation residuals: without it
    choices by ARM were near random (shipped ViT, bfloat16, 24 groups of 8: mean regret 8 % of the spread, 68 % at worst; with it 0.1 and
    2.3 %). It costs one more low and one more full forward per problem; the full one is reused from ``deterministic`` if that was just
    called for the same states, as controllers do.

    Args:
        model: Model, called under ``keyed_noise``, which holds it in evaluation mode.
        share_prefix: Whether to run what precedes the first noise once per problem if that keeps the result; the log says whether.
        compile: False, True, or a mode of torch.compile.
        dtype: Precision of matrix products for candidates; None means the model's own.

    Source: docs/design/decisions.md ("Precision"), ("Row axes").
    """

    def __init__(
        self, model: nn.Module, *, share_prefix: bool = True, compile: bool | str = False, dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.share_prefix, self.compile, self.dtype = model, share_prefix, compile, dtype
        self._low = None if dtype is None else LowPrecision(model, dtype)
        self._prefixes: dict[tuple[Any, ...], SharedPrefix] = {}
        self._traces: dict[tuple[Any, ...], Found] = {}
        self._compiled: dict[tuple[Any, ...], CompiledCall] = {}
        self._last: tuple[Any, ...] | None = None  # weights, inputs and result of the last deterministic step

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(CandidateForward, share_prefix=self.share_prefix, compile=self.compile, dtype=self.dtype), (self.model,)

    def of(self, model: nn.Module) -> CandidateForward:
        """Returns the same settings for another model, with empty caches."""
        forward: CandidateForward = self.__reduce__()[0](model)
        return forward

    @in_turn
    def __call__(self, encoded: Tensor, sites: Sequence[Site], draw: Draw, unpack: Unpack, *, compile: bool = True) -> Tensor:
        """Returns the model's output for ``[N * B, ...]``, problem-major.

        Args:
            encoded: Model inputs, ``[N, ...]``.
            sites: Places of noise, from ``noise_sites``.
            draw: A new draw of ``N * B`` rows.
            unpack: Extracts the tensor from what the model returns.
            compile: False calls the model itself this time, whatever the setting.

        Raises:
            CompileError: The model cannot be compiled.
        """
        found = self._traced(encoded, sites, unpack)
        draw.axes = found.axes
        out = self._candidates(encoded, sites, draw, unpack, compile and bool(self.compile))
        if found.warning is not None:  # only after the model has been called successfully
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
        difference = torch.where(difference.isfinite(), difference, 0.0)  # a step that overflows corrects nothing
        return out.to(full.dtype) + difference.repeat_interleave(len(out) // len(full), 0)

    @in_turn
    def deterministic(self, encoded: Tensor, unpack: Unpack, *, compile: bool = True) -> Tensor:
        """Returns the model's output for ``[N, ...]`` without noise, in its own precision."""
        weights = None if self._low is None else (storage_of(self.model), versions_of(self.model))
        if self._last is not None and self._last[0] == weights and _same(self._last[1], encoded):
            return self._last[2].clone()
        out = unpack(self._called(encoded, [], Draw.of(0, 0, _rows_of(encoded)), compile and bool(self.compile)))
        if self._low is not None:
            self._last = (weights, encoded.clone(), out.clone())
        return out

    def _traced(self, encoded: Tensor, sites: Sequence[Site], unpack: Unpack) -> Found:
        layout = _layout(encoded, sites)
        found, modules = self._traces.get(layout), tuple(s.module for s in sites)
        if found is None or found.modules != modules:
            found = self._traces[layout] = row_trace(self.model, sites, encoded[0], unpack, _autocast(encoded))
        return found

    @in_turn
    def prefix(self, encoded: Tensor, sites: Sequence[Site], draw: Draw, *, low: bool = False) -> SharedPrefix | None:
        """Returns the work that candidates of inputs like ``encoded`` share; None if nothing is shared."""
        if not self.share_prefix or not sites or any(s.kind == INPUT for s in sites):
            return None
        if len(draw.rows) == len(encoded) or len(draw.rows) < CHECKED_ROWS:  # the check would cost more than it saves
            return None
        layout = (low, *_layout(encoded, sites))
        prefix = self._prefixes.get(layout)
        if prefix is None or prefix.outdated or prefix.model is not self._model(low):
            finite = encoded.flatten(1).isfinite().all(1)
            if not finite.any():  # NaN equals NaN in any row, so that the check would find nothing
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
        # A compiled call sees new values of the same tensors, but neither replaced tensors nor new hooks.
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
        pair = torch.stack([state, 0.9 * state.roll(1, -1) + 0.1 * wave])  # another similar state, even if this one is uniform
        rows = torch.cartesian_prod(torch.arange(2), torch.arange(2)).to(draw.rows.device)
        with warnings.catch_warnings(), self._products(state, low):
            warnings.simplefilter("ignore")  # warned about when candidates are made
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
                except OtherPathError as error:  # raised before anything is returned: run the model unshared
                    logger.warning("%s", error)
                    prefix.reason = str(error)
                    draw.start(draw.rows, draw.stream)
            batch = _copies(encoded, count, sites, draw)
            with keyed_noise(model, sites, draw), interruptible():
                return model(batch)

    def _products(self, encoded: Tensor, low: bool) -> AbstractContextManager[None]:
        return self._low.products(encoded.device) if low and self._low is not None else nullcontext()


def _autocast(encoded: Tensor) -> torch.dtype | None:
    """The dtype of the caller's autocast, if it is on."""
    device = encoded.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _layout(encoded: Tensor, sites: Sequence[Site]) -> tuple[Any, ...]:
    """Key of the caches: sites, and inputs up to their number."""
    return tuple((s.name, s.kind) for s in sites), encoded.shape[1:], encoded.dtype, encoded.device, _autocast(encoded)


def _rows_of(encoded: Tensor) -> Tensor:
    return torch.zeros(len(encoded), 2, dtype=torch.int64, device=encoded.device)


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def _copies(encoded: Tensor, count: int, sites: Sequence[Site], draw: Draw) -> Tensor:
    """Repeats model inputs ``[N, ...]`` for each candidate, ``[N * count, ...]``, with the noise of the input's site if there is one."""
    for site in sites:
        if site.kind == INPUT:
            return draw.copies(encoded, count, site.amount, draw.next_number(site)).flatten(0, 1)
    return encoded.repeat_interleave(count, 0)
