"""Searches greedily: every step draws candidates, scores them and keeps the best."""

from __future__ import annotations

from typing import Any

from ttcfast.spec import TTCConfig

from .search import Search

__all__ = ["TTCConfig", "TTCGreedy"]

_KNOWN: dict[str, tuple[Any, str]] = {  # option -> (the only value that greedy search accepts, meaning of the others)
    "approach": ("greedy", "another search"),
    "beam_width": (1, "a search over several beams"),
    "score_aggregation": ("sum", "the aggregation of a path's scores, of which a greedy search has one"),
    "lookahead": (0, "looking ahead"),
    "temperature": (1.0, "sampling by score"),
    "shard": (None, "a search in several processes"),
}


class TTCGreedy(Search):
    """Rolls a surrogate out, choosing each step among B candidates by a score, or combining them by it (``cfg.select``).

    All problems and candidates of a step go through the model at once, or in chunks of one size under ``cfg.chunk_size`` or
    ``cfg.memory_budget``; then only one chunk, the best candidate and candidate 0 are held. The candidates of a ``Surrogate`` are keyed, so
    that neither chunks nor the other problems of a batch change a choice; a foreign model draws in sequence, chunk by chunk.

    Guardrails: candidates that are not finite are rejected. A group without a usable candidate, or below ``cfg.score_floor``, is drawn
    again; then the deterministic step is taken where it is finite, else the best candidate. Where the scores have no spread, candidate 0
    is taken. The result counts every such event.

    Combining candidates (``cfg.select`` ``"softmax_mean"`` and ``"span"``) is experimental: no measurement shows a gain.

    Args:
        fm: A ``Surrogate``, or any model with ``sample_next(x_t, seed=None, multi=False)``.
        scorer: A ``Scorer``, or any callable ``score(x_t, cand_tp1)``; see ``as_scorer``. It sees raw candidates, before projection, unless
            it sets ``scores_projected``.
        cfg: See ``TTCConfig``; None takes the defaults.

    Raises:
        ValueError: An option that greedy search does not have, ``include_deterministic=True`` for a model without a deterministic step, or
            a projection on an open domain.
        TypeError: The model or the scorer lacks the methods needed.

    Source: TTC plan, "TTC Greedy Inference Controller"; docs/design/decisions.md ("Candidates that are not finite"),
    docs/design/decisions.md ("Keyed candidates"), docs/design/decisions.md ("Candidate 0").
    """

    reports_beams = False

    def __init__(self, fm: Any, scorer: Any, cfg: TTCConfig | None = None) -> None:
        cfg = TTCConfig() if cfg is None else cfg
        check_greedy(cfg)
        super().__init__(fm, scorer, cfg)
        if cfg.select == "span" and self.scorer.needs_group:
            raise ValueError(
                f"select is 'span' and {type(scorer).__name__} scores candidates against each other (z-scores), so that it cannot tell how "
                "good one combination is; use zscore=False, or select='argmax'"
            )


def check_greedy(cfg: TTCConfig) -> None:
    """Raise ``ValueError`` for an option that greedy search does not have, rather than ignore it."""
    if not isinstance(cfg, TTCConfig):
        raise ValueError(f"cfg is a {type(cfg).__name__}; give a TTCConfig")
    for name, (known, what) in _KNOWN.items():
        value = getattr(cfg, name)
        if value != known and not (name == "temperature" and cfg.select == "softmax_mean"):
            raise ValueError(f"{name} is {value!r}, {what}, which TTCGreedy does not do; use {name}={known!r}")
