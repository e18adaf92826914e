"""How a surrogate calls its model for candidates: with what they have in common done once, and compiled where asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.stochastic_sampling.keyed import Draw, keyed_noise
from ttcfast.stochastic_sampling.sites import INPUT, Site

from .compiled import CompiledCall, compiled_call
from .shared_prefix import CHECKED_ROWS, OtherPathError, SharedPrefix, Start

logger = logging.getLogger(__name__)


class CandidateForward:
    """Calls a model for B candidates of each of N problems, noise acting at its sites.

    Remembers, for each layout of sites and inputs, what can be shared (``SharedPrefix``) and, with ``compile``, the compiled call of each
    size. Copies and pickles of it remember nothing.

    Args:
        model: called under ``keyed_noise``, which puts it in evaluation.
        share_prefix: run what precedes the first noise once per problem, where that does not change the outcome; the log says whether.
        compile: ``False``, or ``True`` or a mode of torch.compile.
    """

    def __init__(self, model: nn.Module, *, share_prefix: bool = True, compile: bool | str = False) -> None:
        self.model, self.share_prefix, self.compile = model, share_prefix, compile
        self._prefixes: dict[tuple[Any, ...], SharedPrefix] = {}
        self._compiled: dict[tuple[Any, ...], CompiledCall] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (self.model, self.share_prefix, self.compile)

    def __call__(self, encoded: Tensor, sites: Sequence[Site], draw: Draw, *, compile: bool = True) -> Any:
        """What the model returns for ``[N * B, ...]``, problem-major, for inputs ``[N, ...]`` and a fresh ``draw`` of ``N * B`` rows.

        ``compile=False`` calls the model itself this once, whatever was asked for.

        Raises:
            CompileError: the model cannot be compiled.
        """
        prefix = self.prefix(encoded, sites, draw)
        if not (self.compile and compile):
            return self._run(prefix, encoded, sites, draw)
        where = (
            encoded.shape,
            encoded.dtype,
            encoded.device,
            len(draw.rows),
            draw.antithetic,
            tuple((s.name, s.kind, s.amount) for s in sites),
        )
        # By identity: values may change under a compiled call, but tensors that are put in the place of others are not seen by it.
        held = tuple(id(t) for t in (*self.model.parameters(), *self.model.buffers()))
        if (call := self._compiled.get(where)) is None or call.held != held:
            call = self._compiled[where] = compiled_call(
                lambda *inputs: self._run(prefix, inputs[0], sites, Draw(inputs[1], inputs[2], draw.antithetic)),
                (encoded, draw.rows, draw.stream),
                model=self.model,
                mode="default" if self.compile is True else str(self.compile),
                held=held,
            )
        return call(encoded, draw.rows, draw.stream)

    def prefix(self, encoded: Tensor, sites: Sequence[Site], draw: Draw) -> SharedPrefix | None:
        """What candidates of inputs like ``encoded`` share; None where nothing is shared."""
        if not self.share_prefix or not sites or any(s.kind == INPUT for s in sites):
            return None
        if len(draw.rows) == len(encoded) or len(draw.rows) < CHECKED_ROWS:  # so few that the check would be the largest call
            return None
        layout = (tuple((s.name, s.kind) for s in sites), encoded.shape[1:], encoded.dtype, encoded.device)
        if layout not in self._prefixes:
            finite = encoded.flatten(1).isfinite().all(1)
            if not finite.any():  # NaN equals NaN wherever rows are put, so that nothing would be found out
                return None
            self._prefixes[layout] = self._checked(encoded[finite][0], sites, draw)
        prefix = self._prefixes[layout]
        return prefix if prefix.reason is None else None

    def _checked(self, state: Tensor, sites: Sequence[Site], draw: Draw) -> SharedPrefix:
        prefix = SharedPrefix(self.model, [Start(s.module, s.kind in ("after", "latent")) for s in sites if s.module is not None])
        wave = torch.arange(state.numel(), device=state.device).sin().view_as(state).to(state.dtype)
        pair = torch.stack([state, 0.9 * state.roll(1, -1) + 0.1 * wave])  # another state of the same kind, also where this one is uniform
        rows = torch.cartesian_prod(torch.arange(2), torch.arange(2)).to(draw.rows.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what cannot be keyed is said when candidates are made
            prefix.check(pair, lambda: keyed_noise(self.model, sites, Draw(rows, draw.stream, draw.antithetic)))
        name = type(self.model).__name__
        if prefix.reason is None:
            logger.info("%s: candidates share what precedes the first noise: %s", name, ", ".join(prefix.shared))
        else:
            logger.info("%s: candidates share nothing, since %s", name, prefix.reason)
        return prefix

    def _run(self, prefix: SharedPrefix | None, encoded: Tensor, sites: Sequence[Site], draw: Draw) -> Any:
        count = len(draw.rows) // len(encoded)
        if prefix is not None and prefix.reason is None:
            try:
                with keyed_noise(self.model, sites, draw):
                    return prefix(encoded, count)
            except OtherPathError as error:  # seen before anything is returned: the model is called as if nothing were shared
                logger.warning("%s", error)
                prefix.reason = str(error)
                draw = Draw(draw.rows, draw.stream, draw.antithetic)
        batch = _copies(encoded, count, sites, draw)
        with keyed_noise(self.model, sites, draw):
            return self.model(batch)


def _make(model: nn.Module, share_prefix: bool, compile: bool | str) -> CandidateForward:
    return CandidateForward(model, share_prefix=share_prefix, compile=compile)


def _copies(encoded: Tensor, count: int, sites: Sequence[Site], draw: Draw) -> Tensor:
    """Model inputs ``[N, ...]`` for each of their candidates, ``[N * count, ...]``, with the noise of the input's site if there is one."""
    for site in sites:
        if site.kind == INPUT:
            return draw.copies(encoded, count, site.amount, draw.next_number(site)).flatten(0, 1)
    return encoded.repeat_interleave(count, 0)
