"""Checks whether candidates differ, and raises a clear error if they do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ttcfast.runtime.errors import ArgumentError

from .sites import Site

PROBES = 16  # candidates drawn before a model whose candidates coincide is called deterministic
_ROUNDING = 8  # in eps of the dtype, relative to a channel's largest value: rounding of a matrix product that is batched differently


class DeterministicModelError(ArgumentError):
    """Raised for a model that returns the same next state every time although several candidates are requested."""


def all_same(first: Tensor, others: Tensor) -> bool:
    """Returns whether every candidate in ``others [N, B, C, *S]`` equals ``first [N, C, *S]`` up to rounding; NaN counts as different.

    Rounding is measured per problem and channel, so that a large energy, or a problem that blows up, does not hide differences elsewhere.
    """
    limit = _ROUNDING * torch.finfo(first.dtype).eps * _largest(first)  # [N, C, 1...]
    # One candidate at a time, so that a stochastic model is done after the first.
    return all(bool(((others[:, b] - first).abs() <= limit).all()) for b in range(others.shape[1]))


def distinct_count(projections: Tensor, state: Tensor) -> Tensor:
    """Counts each problem's candidates that differ by more than rounding, int64 ``[N]``; a non-finite one differs from all others.

    Args:
        projections: Projections ``[N, B, C]`` of the candidates, from ``projected``.
        state: State being left, ``[N, C, *S]``, in the candidates' dtype; rounding is relative to the largest value of each channel.
    """
    largest = _largest(state).flatten(1).to(projections.dtype)
    largest = largest.maximum(1e-6 * largest.amax(1, keepdim=True)).clamp_min(torch.finfo(state.dtype).tiny)  # for channels that are 0
    scaled = projections / largest.unsqueeze(1)
    order = (scaled * _weights(scaled.shape[2], scaled.dtype, scaled.device)).sum(2).argsort(1).unsqueeze(2).expand_as(scaled)
    ordered = scaled.gather(1, order)  # so that candidates that differ by rounding are neighbours
    units = 1 if state.dtype.itemsize == 2 else _ROUNDING  # the last rounding to 16 bits outweighs all before it
    limit = 4 * units * torch.finfo(state.dtype).eps * state[0, 0].numel() ** 0.5  # sum of that many roundings under random signs
    return 1 + (~((ordered[:, 1:] - ordered[:, :-1]).abs().amax(2) <= limit)).sum(1)


def projected(candidates: Tensor) -> Tensor:
    """Projects each channel of candidates ``[N, B, C, *S]`` to the sum of its cells with random signs, ``[N, B, C]``.

    Different candidates have equal projections only by rare chance. Projections of 16-bit candidates are float32.
    """
    flat = candidates.flatten(3).to(torch.promote_types(candidates.dtype, torch.float32))
    with torch.autocast(flat.device.type, enabled=False):
        return flat @ _signs(flat.shape[3], flat.dtype, flat.device)


@lru_cache(maxsize=8)
def _weights(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(1, channels + 1).sqrt().to(device, dtype)


@lru_cache(maxsize=8)
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(device, dtype)


def _largest(state: Tensor) -> Tensor:
    """Returns the largest absolute value in each channel of ``[N, C, *S]``, ``[N, C, 1...]``."""
    return state.abs().flatten(2).amax(2).reshape(*state.shape[:2], *[1] * (state.ndim - 2))


def require_distinct(
    candidates: Tensor,
    model: object,
    what: str = "candidates of a step",
    *,
    sites: Sequence[Site] | None = None,
    acting: Sequence[Site] | None = None,
) -> None:
    """Raises ``DeterministicModelError`` if the candidates ``[N, B, C, *S]`` of every problem are all the same.

    The message calls them ``what``; ``sites`` and ``acting`` are those of ``deterministic_error``.

    Source: docs/design/decisions.md ("Dropout that acts").
    """
    if candidates.shape[1] > 1 and all_same(candidates[:, 0], candidates[:, 1:]):
        apart = float((candidates - candidates[:, :1]).abs().amax((0, 1)).flatten(1).amax())
        rounding = f" but for rounding (they differ by {apart:.2g} at most)" if apart else ""
        same = f"{candidates.shape[1]} {what} are all the same{rounding}"
        raise deterministic_error(model, same, sites=sites, acting=acting)


def require_stochastic(
    draw: Callable[[Tensor], Tensor], after: int, at_once: int, model: object, sites: Callable[[], Mapping[str, Sequence[Site]]] = dict
) -> int:
    """Draws more candidates of a state whose candidates are all the same, since at low dropout rates a few may agree by chance.

    ``Surrogate`` calls it for the candidates of one call, a search for those of its first step.

    Args:
        draw: Returns the candidates ``[1, B, C, *S]`` of ids ``[B]``.
        after: The first id to draw.
        at_once: Number of candidates drawn and compared together. Noise drawn once per call, which leaves nothing to choose within a
            group, thus counts as none unless candidates are drawn one by one.
        model: Model to name in the message.
        sites: Returns the arguments ``sites`` and ``acting`` of ``deterministic_error``; called after all draws.

    Returns:
        The number of candidates drawn, at least ``PROBES``.

    Raises:
        DeterministicModelError: They are all the same too.
    """
    ids = torch.arange(after, after + max(PROBES, at_once)).split(at_once)
    count, drawn = sum(map(len, ids)), [draw(part) for part in ids]
    if at_once == 1 or len(drawn) == 1:
        require_distinct(torch.cat(drawn, 1), model, what="probes", **sites())
    elif all(all_same(d[:, 0], d[:, 1:]) for d in drawn):
        raise deterministic_error(model, f"{count} probes, drawn {at_once} at once, are the same within a draw", **sites())
    return count


def deterministic_error(
    model: object, why: str, *, sites: Sequence[Site] | None = None, acting: Sequence[Site] | None = None
) -> DeterministicModelError:
    """Returns the error for a model whose candidates are all the same, with remedies.

    Args:
        model: Model to name in the message.
        why: Observation about its candidates.
        sites: Places where noise enters a surrogate's model, if known.
        acting: Those of ``sites`` that the model passed through.
    """
    last = "set chunk_size=1 for a model that draws its noise once per call, or use branching_factor=1"
    text = f"{type(model).__name__} stays deterministic: {why}; "
    if callable(getattr(model, "sample_next", None)):  # draws its own noise
        return DeterministicModelError(
            f"{text}let sample_next draw anew for every state it is given, wrap the model in a Surrogate, which has dropout and noise for "
            f"any module, {last}"
        )
    if sites is not None:
        told = ", ".join(map(_told, list(acting or ())[:4]))
        text += f"of {len(sites)} noise sites {len(acting or ())} acted" + (f" ({told})" if told else "") + "; "
    names = _could_take_noise(model) if isinstance(model, nn.Module) else ""
    return DeterministicModelError(
        f"{text}set a dropout rate (StochasticConfig dropout_p=), inject dropout behind named modules (dropout_after=), add noise "
        f"(input_eps=, latent_sigma=){names}, hold modules that call dropout by function in training (training_modules=), {last}"
    )


def _told(site: Site) -> str:
    """Describes a site: its noise, the amount if known, and the place."""
    where = "the input" if site.module is None else repr(site.name) if site.name else "the model itself"
    return f"{site.kind} {'of unknown rate' if math.isnan(site.amount) else format(site.amount, 'g')} at {where}"


def _could_take_noise(model: nn.Module, most: int = 4) -> str:
    """Lists modules after which noise passes through further layers: placeholders, linear layers and convolutions but the last."""
    names = [name for name, m in model.named_modules() if name and isinstance(m, (nn.Identity, nn.Linear, _ConvNd))][:-1]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f", for which there are modules {', '.join(map(repr, names[:most]))}{more}" if names else ""
