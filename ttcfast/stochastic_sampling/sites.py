"""The places where noise enters a model, as data: which module, what is drawn there, how much, and the number that names its stream."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ttcfast.spec import StochasticConfig

from .dropout_wrap import check_switch, injected_dropout, is_dropout, learns_when_called, rate_of
from .functional_dropout import functional_dropout

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
            noise on its output), ``"input"`` (Gaussian noise on what the model is given) and ``"training"``: the module, without those
            inside it, is held in training for what it drops by function, which cannot be keyed.
        amount: rate of a dropout, standard deviation of Gaussian noise; above 0. NaN for a module held in training whose rate is not known.
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
        return self.kind in ("after", "training") or self.kind in DROPOUTS

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
        ValueError: names in ``dropout_after``, ``training_modules`` or ``latent_at`` that the model does not have, ``dropout_after``
            without ``dropout_p``, ``latent_sigma`` for a model that does not say where its latent is.
    """
    sites = [Site("", INPUT, config.input_eps)] if config.input_eps > 0 else []
    modules = dict(model.named_modules())
    sites += [Site(name, "training", math.nan if rate is None else rate, modules[name]) for name, rate in _held(model, modules, config)]
    sequence_first = _sequence_first(modules.values())
    if config.dropout:
        check_switch(model, config.dropout_p, config.dropout_after)
        for name, module in modules.items():
            if is_dropout(module) and (rate := rate_of(module) if config.dropout_p is None else config.dropout_p) > 0:
                sites.append(Site(name, _kind(module), rate, module, module in sequence_first))
        sites += [Site(name, "after", rate, modules[name], modules[name] in sequence_first) for name, rate in _injected(modules, config)]
    if config.latent_sigma > 0:
        name = _latent_name(model, modules, config)
        sites.append(Site(name, "latent", config.latent_sigma, modules[name], modules[name] in sequence_first))
    return sites


def _injected(modules: Mapping[str, nn.Module], config: StochasticConfig) -> Iterator[tuple[str, float]]:
    """Names and rates of dropout behind the modules of ``dropout_after``, and of that which ``enable_mc_dropout`` injected for good."""
    for name, module in modules.items():
        hook = injected_dropout(module) if module._forward_hooks else None
        rate = config.dropout_p if name in config.dropout_after else None if hook is None else hook.p
        if rate:
            yield name, rate


def _held(model: nn.Module, modules: Mapping[str, nn.Module], config: StochasticConfig) -> Iterator[tuple[str, float | None]]:
    """Names of the modules to be held in training, and the rates of what they drop by function."""
    found = functional_dropout(model) if config.dropout or config.training_modules else {}
    if config.training_modules is None:
        yield from found.items()
        return
    if unknown := [name for name in config.training_modules if name not in modules]:
        raise ValueError(f"training_modules names {unknown}, which {type(model).__name__} does not have; see model.named_modules()")
    inside = {inner for name in config.training_modules for inner in modules[name].modules()}
    for name, module in modules.items():
        if module in inside and not (is_dropout(module) or learns_when_called(module)):
            yield name, found.get(name)


def _latent_name(model: nn.Module, modules: Mapping[str, nn.Module], config: StochasticConfig) -> str:
    name = config.latent_at if config.latent_at is not None else getattr(model, "latent_module", None)
    if not isinstance(name, str):
        raise ValueError(
            f"latent_sigma is {config.latent_sigma} but {type(model).__name__} does not say where its latent is; "
            "name the module in StochasticConfig(latent_at=...) or set model.latent_module, or set latent_sigma=0"
        )
    if name not in modules:
        raise ValueError(f"the latent module is {name!r}, which {type(model).__name__} does not have; see model.named_modules()")
    return name


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
    if getattr(module, "with_noise", False):  # timm's DropBlock with Gaussian noise in the holes
        return "own"
    return "block" if hasattr(module, "block_size") else "path"


def _sequence_first(modules: Collection[nn.Module]) -> set[nn.Module]:
    """The modules inside a block whose attention takes ``[L, M, D]``: its dropouts see tensors of that layout too."""
    attention = {m for m in modules if isinstance(m, nn.MultiheadAttention) and not m.batch_first}
    blocks = [m for m in modules if attention.intersection(m.children())] if attention else []
    return {inner for block in blocks for inner in block.modules()}
