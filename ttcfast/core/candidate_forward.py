"""Calls a surrogate's model for candidates, on request compiled or in low precision."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttcfast.runtime.turns import in_turn, interruptible
from ttcfast.stochastic_sampling.keyed import Draw, keyed_noise
from ttcfast.stochastic_sampling.sites import INPUT, Site

from .compiled import CompiledCall, compiled_call
from .context import repeated
from .low_precision import LowPrecision, hooks_of, storage_of, versions_of
from .onednn import onednn_products
from .row_trace import Found, row_trace

Unpack = Callable[[Any], Tensor]


class _Call(NamedTuple):
    """The inputs of one call of the model."""

    encoded: Tensor  # model inputs, [N, ...]
    given: Mapping[str, Tensor]  # keyword arguments of the model, [N, ...] each
    sites: Sequence[Site]
    draw: Draw  # of N * B rows

    @property
    def inputs(self) -> list[Tensor]:
        return [self.encoded, *self.given.values()]


class CandidateForward:
    """Calls a model for B candidates of each of N problems, with noise at its sites, and for the deterministic step.

    For each layout of sites and inputs it caches the axis of the states at each site (``row_trace``) and, with ``compile``, the compiled
    call for each size. Copies and pickles start with empty caches. Calls are turns (``ttcfast.runtime.turns``), so that threads share
    neither the model nor the caches at the same time.

    With ``dtype``, candidates are computed in low precision (``LowPrecision``) and corrected by the deterministic step, which is computed
    both ways: ``low(candidate) + full(deterministic) - low(deterministic)``. This cancels the error that all candidates of a problem have
    in common, above all that of rounded weights, which exceeds the differences between the candidates' conservation residuals: without it
    choices by ARM were near random (``python -m bench step --case 'arithmetic*'`` prints the regret that is left, which exceeds 5 % of the
    spread in a few groups). It costs one more low and one more full forward per problem; the full one is reused from ``deterministic`` if
    that was just called for the same states, as controllers do.

    Args:
        model: Model, called under ``keyed_noise``, which holds it in evaluation mode.
        compile: False, True, or a mode of torch.compile.
        dtype: Precision of matrix products for candidates; None means the model's own.

    Source: docs/design/decisions.md ("Precision"), ("Row axes").
    """

    def __init__(self, model: nn.Module, *, compile: bool | str = False, dtype: torch.dtype | None = None) -> None:
        self.model, self.compile, self.dtype = model, compile, dtype
        self._low = None if dtype is None else LowPrecision(model, dtype)
        self._traces: dict[tuple[Any, ...], Found] = {}
        self._compiled: dict[tuple[Any, ...], CompiledCall] = {}
        self._last: tuple[Any, ...] | None = None  # weights, states, inputs and result of the last deterministic step

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(CandidateForward, compile=self.compile, dtype=self.dtype), (self.model,)

    def of(self, model: nn.Module) -> CandidateForward:
        """Returns the same settings for another model, with empty caches."""
        forward: CandidateForward = self.__reduce__()[0](model)
        return forward

    @in_turn
    def __call__(
        self,
        encoded: Tensor,
        sites: Sequence[Site],
        draw: Draw,
        unpack: Unpack,
        *,
        given: Mapping[str, Tensor] | None = None,
        compile: bool = True,
        of: Tensor | None = None,
    ) -> Tensor:
        """Return the model's output for ``[N * B, ...]``, problem-major.

        Args:
            encoded: Model inputs, ``[N, ...]``.
            sites: Places of noise, from ``noise_sites``.
            draw: A new draw of ``N * B`` rows.
            unpack: Extracts the tensor from what the model returns.
            given: Keyword arguments of the model for each of the N states, ``[N, ...]``.
            compile: False calls the model itself this time, whatever the setting.
            of: The states that ``encoded`` was computed from, by which a step computed just before is recognised.

        Raises:
            CompileError: The model cannot be compiled.
        """
        call = _Call(encoded, given or {}, sites, draw)
        found = self._traced(encoded, sites, call.given, unpack)
        draw.axes = found.axes
        out = self._candidates(call, unpack, compile and bool(self.compile), of)
        if found.warning is not None:  # only after the model has been called successfully
            warnings.warn(found.warning, RuntimeWarning, stacklevel=7)
            found.warning = None
        return out

    def keyed(self, encoded: Tensor, sites: Sequence[Site], given: Mapping[str, Tensor]) -> bool:
        """Returns whether such a call was traced and draws nothing but keyed noise, so that no random stream need be seeded."""
        found = self._traces.get(_layout(encoded, sites, given))
        if found is None or not found.keyed or found.modules != tuple(s.module for s in sites):
            return False
        return found.hooks == hooks_of(self.model)  # a new one may draw

    @in_turn
    def spares(self, encoded: Tensor, sites: Sequence[Site], given: Mapping[str, Tensor], unpack: Unpack) -> bool:
        """Returns whether states of such a call can go without noise (``Draw.still``), after a trace where there was none.

        Not where noise is drawn without a key or is the same for all states, nor in low precision, which the deterministic step corrects.
        """
        if self._low is not None:
            return False
        found = self._traced(encoded, sites, given, unpack)
        common = any(axis is not None and axis.rows == "common" for axis in (found.axes or {}).values())
        return not common and self.keyed(encoded, sites, given)

    def _candidates(self, call: _Call, unpack: Unpack, compile: bool, of: Tensor | None) -> Tensor:
        if self._low is None:
            return unpack(self._called(call, compile))
        out = unpack(self._called(call._replace(sites=self._low.sites(call.sites)), compile, low=True))
        still = call._replace(sites=[], draw=Draw(_rows_of(call.encoded), call.draw.stream))
        full = self.deterministic(call.encoded, unpack, given=call.given, compile=compile, of=of)
        difference = full - unpack(self._called(still, compile, low=True)).to(full.dtype)
        difference = torch.where(difference.isfinite(), difference, 0.0)  # a step that overflows corrects nothing
        return out.to(full.dtype) + difference.repeat_interleave(len(out) // len(full), 0)

    @in_turn
    def deterministic(
        self,
        encoded: Tensor,
        unpack: Unpack,
        *,
        given: Mapping[str, Tensor] | None = None,
        compile: bool = True,
        of: Tensor | None = None,
    ) -> Tensor:
        """Returns the model's output for ``[N, ...]`` without noise, in its own precision; ``of`` as for a call."""
        call = _Call(encoded, given or {}, [], Draw.of(0, 0, _rows_of(encoded)))
        if self._low is None:
            return unpack(self._called(call, compile and bool(self.compile)))
        weights, source = (storage_of(self.model), versions_of(self.model)), _Source.of(of)
        if self._last is not None and self._last[0] == weights and _same(self._last[1:3], (source, call.inputs)):
            last: Tensor = self._last[3]
            return last.clone()
        out = unpack(self._called(call, compile and bool(self.compile)))
        self._last = (weights, source, [x.clone() for x in call.inputs], out.clone())
        return out

    def _traced(self, encoded: Tensor, sites: Sequence[Site], given: Mapping[str, Tensor], unpack: Unpack) -> Found:
        modules, layout = tuple(s.module for s in sites), _layout(encoded, sites, given)
        found = self._traces.get(layout)
        if found is None or found.modules != modules:
            found = self._traces[layout] = row_trace(self.model, sites, encoded[0], unpack, _autocast(encoded), given)
        return found

    def _model(self, low: bool) -> nn.Module:
        return self._low.current if low and self._low is not None else self.model

    def _called(self, call: _Call, compile: bool, *, low: bool = False) -> Any:
        encoded, draw, model = call.encoded, call.draw, self._model(low)
        if not compile:
            return self._run(model, call, low)
        noise = tuple((s.name, s.kind, s.amount) for s in call.sites)
        shapes = tuple((x.shape, x.dtype) for x in call.inputs)
        where = (low, shapes, encoded.device, tuple(call.given), _autocast(encoded), len(draw.rows), draw.antithetic, draw.still, noise)
        # A compiled call sees new values of the same tensors, but neither replaced tensors nor new hooks.
        held = (storage_of(model), hooks_of(model))
        if (compiled := self._compiled.get(where)) is None or compiled.held != held:

            def run(rows: Tensor, stream: Tensor, x: Tensor, *given: Tensor) -> Any:
                own = Draw(rows, stream, draw.antithetic, still=draw.still, axes=draw.axes)
                return self._run(model, _Call(x, dict(zip(call.given, given)), call.sites, own), low)

            compiled = self._compiled[where] = compiled_call(
                run,
                (draw.rows, draw.stream, *call.inputs),
                model=model,
                mode="default" if self.compile is True else str(self.compile),
                held=held,
            )
        with interruptible():
            return compiled(draw.rows, draw.stream, *call.inputs)

    def _run(self, model: nn.Module, call: _Call, low: bool) -> Any:
        encoded, draw, sites = call.encoded, call.draw, call.sites
        count = len(draw.rows) // len(encoded)
        with self._products(encoded, low), onednn_products(model, encoded):
            batch = _copies(encoded, count, sites, draw)
            with keyed_noise(model, sites, draw), interruptible():
                return model(batch, **repeated(call.given, count))

    def _products(self, encoded: Tensor, low: bool) -> AbstractContextManager[None]:
        return self._low.products(encoded.device) if low and self._low is not None else nullcontext()


def _layout(encoded: Tensor, sites: Sequence[Site], given: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Return the key of the caches: the sites, and the inputs without their number of rows."""
    shapes = tuple((x.shape[1:], x.dtype) for x in (encoded, *given.values()))
    return tuple((s.name, s.kind) for s in sites), tuple(given), shapes, encoded.device, _autocast(encoded)


def _autocast(encoded: Tensor) -> torch.dtype | None:
    """Return the dtype of the caller's autocast, None if it is off."""
    device = encoded.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _rows_of(encoded: Tensor) -> Tensor:
    return torch.zeros(len(encoded), 2, dtype=torch.int64, device=encoded.device)


class _Source(NamedTuple):
    """Memory that holds the same states as long as its version is the same."""

    states: Tensor  # kept, so that no other tensor gets its memory
    place: tuple[Any, ...]
    version: int

    @classmethod
    def of(cls, states: Tensor | None) -> _Source | None:
        if states is None or states.is_inference():  # which has no version
            return None
        return cls(states, (states.data_ptr(), states.shape, states.stride(), states.dtype, states.device), states._version)


def _same(a: tuple[_Source | None, list[Tensor]], b: tuple[_Source | None, list[Tensor]]) -> bool:
    """Tell whether two calls have the same inputs: on the host by their values, on a GPU, which would have to be waited for, by where the
    states are that they were computed from."""
    (one, inputs), (two, others) = a, b
    if [(x.shape, x.dtype, x.device) for x in inputs] != [(x.shape, x.dtype, x.device) for x in others]:
        return False
    if not inputs[0].is_cuda:
        return all(map(torch.equal, inputs, others))
    return len(inputs) == 1 and one is not None and two is not None and one[1:] == two[1:]


def _copies(encoded: Tensor, count: int, sites: Sequence[Site], draw: Draw) -> Tensor:
    """Repeat model inputs ``[N, ...]`` for each candidate, ``[N * count, ...]``, with the noise of the input's site if there is one."""
    for site in sites:
        if site.kind == INPUT:
            noisy = draw.copies(encoded, count, site.amount, draw.next_number(site))
            if draw.still:
                noisy[:, 0] = encoded
            return noisy.flatten(0, 1)
    return encoded.repeat_interleave(count, 0)
