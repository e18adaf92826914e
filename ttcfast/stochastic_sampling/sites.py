"""Lists the places where noise enters a model: which module, what is drawn there, how much, and the number of its random stream."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import AveragedModel

from ttcfast.spec import StochasticConfig

from .dropout_wrap import check_switch, injected_dropout, is_dropout, learns_when_called, matching, rate_of
from .functional_dropout import functional_dropout
from .noise_site import NoiseSite

INPUT = "input"
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)  # they hold the model as "module"
_WRAPPED = ("_adapted", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # its name in ttcfast.adapters and torch
_CALL = 0x9E3779B1  # odd, so that calls of one module never share a stream
_ADDED = (INPUT, "latent", "directions")  # kinds that add noise; all others drop entries


@dataclass(frozen=True, eq=False)
class Site:
    """One place where noise enters a model.

    Args:
        name: Name of the module in ``model.named_modules()``; ``""`` for the model's input.
        kind: What is drawn. Dropout modules have ``"entries"``, ``"channels"``, ``"alpha"``, ``"channels alpha"``, ``"path"`` (whole
            states), ``"block"`` (DropBlock), ``"attention"`` (weights of nn.MultiheadAttention), or ``"own"``, a dropout that cannot be
            keyed and draws from the global streams. Others are ``"after"`` (dropout injected behind the module), ``"latent"`` (Gaussian
            noise on its output), ``"input"`` (Gaussian noise on the model's input), and ``"training"``: the module, but not its children,
            is held in training mode because it calls dropout as a function, which cannot be keyed.
        amount: Rate of a dropout or standard deviation of Gaussian noise, positive; NaN for kind ``"training"`` if the rate is unknown.
        module: The module; None for the input.
        sequence_first: Whether states are in the second of three axes where sizes are ambiguous (torch's ``batch_first=False``).
        plain_name: Name without the parts added by wrappers around models (``_plain_names``); None if there are none.

    Attributes:
        number: Names the random stream: 32 bits derived from ``kind`` and the plain name, the same in every process, for every batch, and
            for a wrapped model. Two noises at one module are independent, because ``kind`` counts.

    Source: docs/design/decisions.md ("Keyed candidates").
    """

    name: str
    kind: str
    amount: float
    module: nn.Module | None = None
    sequence_first: bool = False
    plain_name: str | None = None
    number: int = field(init=False)

    @property
    def is_dropout(self) -> bool:
        """Whether the site drops entries rather than adding noise."""
        return self.kind not in _ADDED

    def __post_init__(self) -> None:
        text = f"{self.kind}:{self.name if self.plain_name is None else self.plain_name}"
        object.__setattr__(self, "number", int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little"))

    def number_of(self, call: int) -> int:
        """Returns the stream of the module's call number ``call`` (from 0) within a forward, by arithmetic that torch.compile can trace."""
        return (self.number + call * _CALL) % 2**32


def noise_sites(model: nn.Module, config: StochasticConfig) -> list[Site]:
    """Lists every place where ``config`` puts noise into ``model``. Nothing is cached, since rates and modules may change between calls.

    The order is: the input, modules held in training, dropout modules in the model's order, injected dropout, the latent, ``NoiseSite``
    modules, which act under every configuration. A module with
    several names counts under the first. Names in ``config`` may be those of the model inside its wrappers (DataParallel, DDP,
    torch.compile).

    Raises:
        ValueError: ``dropout_after``, ``training_modules`` or ``latent_at`` names a module that the model does not have, ``dropout_after``
            lacks ``dropout_p``, ``latent_sigma`` is set for a model that does not declare its latent, or the model is a DataParallel over
            several devices.
    """
    sites = [Site("", INPUT, config.input_eps)] if config.input_eps > 0 else []
    modules = dict(model.named_modules())
    sequence_first, plain = _sequence_first(modules.values()), _plain_names(modules)

    def site(name: str, kind: str, amount: float) -> Site:
        return Site(name, kind, amount, modules[name], modules[name] in sequence_first, plain.get(name))

    held = None if config.training_modules is None else _as_wrapped(config.training_modules, modules, plain)
    sites += [site(name, "training", math.nan if rate is None else rate) for name, rate in _held(model, modules, held, config.dropout)]
    if config.dropout:
        after = matching(config.dropout_after, modules, plain)
        check_switch(model, config.dropout_p, after)
        for name, module in modules.items():
            if is_dropout(module) and (rate := rate_of(module) if config.dropout_p is None else config.dropout_p) > 0:
                sites.append(site(name, _kind(module), rate))
        sites += [site(name, "after", rate) for name, rate in _injected(modules, config.dropout_p, after)]
    if config.latent_sigma > 0:
        sites.append(site(_latent_name(model, modules, plain, config), "latent", config.latent_sigma))
    taken = {s.name for s in sites if s.kind == "latent"}
    own = ((name, m) for name, m in modules.items() if isinstance(m, NoiseSite) and m.sigma > 0 and name not in taken)
    return sites + [site(name, "latent", module.sigma) for name, module in own]


def _plain_names(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Returns the names that wrapped modules have within the model inside the wrapper."""
    hidden = {f"{name}.module".lstrip(".") for name, m in modules.items() if isinstance(m, _WRAPPERS)}
    hidden |= {name for name in modules if name.rpartition(".")[2] in _WRAPPED}
    if not hidden:
        return {}
    for name, module in modules.items():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                f"{name or 'the model'} is a DataParallel over {len(module.device_ids)} devices, which runs copies of the model in threads "
                "of its own, where candidates cannot be told apart; give the Surrogate the model itself (.module)"
            )
    parts = {name: name.split(".") for name in modules}
    return {
        name: ".".join(part for i, part in enumerate(each) if ".".join(each[: i + 1]) not in hidden)
        for name, each in parts.items()
        if any(".".join(each[: i + 1]) in hidden for i in range(len(each)))
    }


def _as_wrapped(names: Sequence[str], modules: Mapping[str, nn.Module], plain: Mapping[str, str]) -> Sequence[str]:
    """Converts names within the model itself to names within its wrappers."""
    if not plain or isinstance(names, str):
        return names
    full = {short: name for name, short in reversed(list(plain.items()))}  # the outermost of several
    return [name if name in modules else full.get(name, name) for name in names]


def _injected(modules: Mapping[str, nn.Module], p: float | None, after: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yields names and rates of dropout behind the modules of ``after``, and of dropout that ``enable_mc_dropout`` injected."""
    for name, module in modules.items():
        hook = injected_dropout(module) if module._forward_hooks else None
        rate = p if name in after else None if hook is None else hook.p
        if rate:
            yield name, rate


def _held(
    model: nn.Module, modules: Mapping[str, nn.Module], asked: Sequence[str] | None, dropout: bool
) -> Iterator[tuple[str, float | None]]:
    """Yields the names of modules to hold in training, with the rates of their functional dropout."""
    found = functional_dropout(modules) if dropout or asked else {}
    if asked is None:
        yield from found.items()
        return
    if unknown := [name for name in asked if name not in modules]:
        raise ValueError(f"training_modules names {unknown}, which {type(model).__name__} does not have; see model.named_modules()")
    inside = {inner for name in asked for inner in modules[name].modules()}
    for name, module in modules.items():
        if module in inside and not (is_dropout(module) or learns_when_called(module)):
            yield name, found.get(name)


def _latent_name(model: nn.Module, modules: Mapping[str, nn.Module], plain: Mapping[str, str], config: StochasticConfig) -> str:
    name = config.latent_at
    for outer, module in modules.items():  # the model, and the one inside its wrappers
        if name is None and (outer == "" or plain.get(outer) == ""):
            name = getattr(module, "latent_module", None)
    if not isinstance(name, str):
        raise ValueError(
            f"latent_sigma is {config.latent_sigma} but {type(model).__name__} does not say where its latent is; "
            "name the module in StochasticConfig(latent_at=...) or set model.latent_module, or set latent_sigma=0"
        )
    (name,) = _as_wrapped((name,), modules, plain)
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
    """Returns the kind of a dropout module's site; ``"own"`` if its forward is not the known one."""
    for known, kind in _KINDS.items():
        if isinstance(module, known):
            return kind if type(module).forward is known.forward and "forward" not in vars(module) else "own"
    if isinstance(module, (_DropoutNd, torch.jit.ScriptModule)):
        return "own"
    if getattr(module, "with_noise", False):  # timm's DropBlock with Gaussian noise in the holes
        return "own"
    return "block" if hasattr(module, "block_size") else "path"


def _sequence_first(modules: Collection[nn.Module]) -> set[nn.Module]:
    """Returns the modules inside blocks whose attention takes ``[L, M, D]``, since their dropouts see that layout too."""
    attention = {m for m in modules if isinstance(m, nn.MultiheadAttention) and not m.batch_first}
    blocks = [m for m in modules if attention.intersection(m.children())] if attention else []
    return {inner for block in blocks for inner in block.modules()}
