"""The places where noise enters a model, as data: which module, what is drawn there, how much, and the number that names its stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ttcfast.spec import StochasticConfig

from .dropout_wrap import check_switch, dropout_modules, injected_dropout, rate_of

INPUT = "input"
_CALL = 0x9E3779B1  # odd, so that calls of one module never share a stream
DROPOUTS = ("entries", "channels", "alpha", "channels alpha", "path", "block", "attention", "own")  # kinds that a model's modules have


@dataclass(frozen=True, eq=False)
class Site:
    """One place where noise enters a model.

    Args:
        name: of the module, as in ``model.named_modules()``; ``""`` for the model's input.
        kind: what is drawn. Of dropout modules ``"entries"``, ``"channels"``, ``"alpha"``, ``"channels alpha"``, ``"path"`` (whole
            states), ``"block"`` (DropBlock), ``"attention"`` (weights of nn.MultiheadAttention), or ``"own"``: a dropout that cannot be
            keyed and draws from the global streams. Besides ``"after"`` (dropout injected behind the module), ``"latent"`` (Gaussian
            noise on its output) and ``"input"`` (Gaussian noise on what the model is given).
        amount: rate of a dropout, standard deviation of Gaussian noise; above 0.
        module: the module itself; None for the input.
        sequence_first: where sizes allow both readings, states stand in the second axis of three (torch's ``batch_first=False``).

    Attributes:
        number: names the stream, in 32 bits of ``kind`` and ``name``: the same in every process and for every batch. ``kind`` counts, so
            that two noises at one module are independent.
    """

    name: str
    kind: str
    amount: float
    module: nn.Module | None = None
    sequence_first: bool = False
    number: int = field(init=False)

    @property
    def is_dropout(self) -> bool:
        return self.kind == "after" or self.kind in DROPOUTS

    def __post_init__(self) -> None:
        text = f"{self.kind}:{self.name.replace('_orig_mod.', '')}"  # torch.compile puts that before names
        object.__setattr__(self, "number", int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little"))

    def number_of(self, call: int) -> int:
        """The stream of the module's call number ``call`` (from 0) within a forward; no hashing, so that torch.compile can trace it."""
        return (self.number + call * _CALL) % 2**32


def noise_sites(model: nn.Module, config: StochasticConfig) -> list[Site]:
    """Every place where ``config`` puts noise into ``model``, found anew at each call, since rates and modules may change between calls.

    The input comes first, then dropout modules in the model's own order, injected dropout, the latent. A module under several names
    counts under its first.

    Raises:
        ValueError: names in ``dropout_after`` or ``latent_at`` that the model does not have, ``dropout_after`` without ``dropout_p``,
            ``latent_sigma`` for a model that does not say where its latent is.
    """
    sites = [Site("", INPUT, config.input_eps)] if config.input_eps > 0 else []
    if config.dropout:
        check_switch(model, config.dropout_p, config.dropout_after)
        sites += _dropout_sites(model, config.dropout_p)
        sites += _injected_sites(model, config.dropout_p, config.dropout_after)
    if config.latent_sigma > 0:
        sites.append(_latent_site(model, config))
    return sites


def _dropout_sites(model: nn.Module, p: float | None) -> Iterator[Site]:
    sequence_first = _sequence_first(model)
    names = {id(m): name for name, m in model.named_modules()}
    for module in dropout_modules(model):
        rate = rate_of(module) if p is None else p
        if rate > 0:
            yield Site(names[id(module)], _kind(module), rate, module, id(module) in sequence_first)


def _injected_sites(model: nn.Module, p: float | None, after: Sequence[str]) -> Iterator[Site]:
    """Dropout behind the modules of ``after``, and that which ``enable_mc_dropout`` injected for good."""
    sequence_first = _sequence_first(model)
    for name, module in model.named_modules():
        hook = injected_dropout(module)
        rate = p if name in after else None if hook is None else hook.p
        if rate:
            yield Site(name, "after", rate, module, id(module) in sequence_first)


def _latent_site(model: nn.Module, config: StochasticConfig) -> Site:
    name = config.latent_at if config.latent_at is not None else getattr(model, "latent_module", None)
    if not isinstance(name, str):
        raise ValueError(
            f"latent_sigma is {config.latent_sigma} but {type(model).__name__} does not say where its latent is; "
            "name the module in StochasticConfig(latent_at=...) or set model.latent_module, or set latent_sigma=0"
        )
    module = dict(model.named_modules()).get(name)
    if module is None:
        raise ValueError(f"the latent module is {name!r}, which {type(model).__name__} does not have; see model.named_modules()")
    return Site(name, "latent", config.latent_sigma, module, id(module) in _sequence_first(model))


_KINDS: dict[type[nn.Module], str] = {
    nn.Dropout: "entries",
    nn.Dropout1d: "channels",
    nn.Dropout2d: "channels",
    nn.Dropout3d: "channels",
    nn.AlphaDropout: "alpha",
    nn.FeatureAlphaDropout: "channels alpha",
    nn.MultiheadAttention: "attention",
}


def _kind(module: nn.Module) -> str:
    """What a dropout module draws; ``"own"`` where its forward is not the one that we know."""
    for known, kind in _KINDS.items():
        if isinstance(module, known):
            return kind if type(module).forward is known.forward and "forward" not in vars(module) else "own"
    if isinstance(module, (_DropoutNd, torch.jit.ScriptModule)):
        return "own"
    return "block" if hasattr(module, "block_size") else "path"


def _sequence_first(model: nn.Module) -> set[int]:
    """Ids of the modules inside a block whose attention takes ``[L, M, D]``: its dropouts see tensors of that layout too."""
    blocks = (m for m in model.modules() if any(isinstance(c, nn.MultiheadAttention) and not c.batch_first for c in m.children()))
    return {id(inner) for block in blocks if not isinstance(block, nn.MultiheadAttention) for inner in block.modules()}
