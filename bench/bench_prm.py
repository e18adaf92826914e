"""Scoring candidates with a reward model: ``PRMScorer`` against the plan's plain forward on the same weights, and its precisions.

* ``seed, plain``: the network printed in TTC plan, "PRM Model": state expanded and concatenated, all candidates at once. In names of peers
  and sizes, ``seed`` stands for the plan's sketch.
* ``seed, torch.compile``: the same compiled.
* ``ttcfast, one chunk``: only the savings due to linearity.

All compute in float32 and agree to rounding. ``zeros`` is the plan's padding, whose state dict it loads; ``periodic`` pads according to the
data's boundary, and the plan's network gets ``padding_mode="circular"``.

``shipped`` is the reward in ``examples/prm`` on 16 structured candidates of the shipped surrogate for each of 8 true states, in float32 and
bfloat16 (autocast, head in float32) and both memory layouts. These agree only to bfloat16's rounding: the rows' note gives the regret, in
float32 scores and relative to the group's spread, of choosing by bfloat16; see docs/design/decisions.md ("Precision").

``sizes`` compares the cost of reward models of several sizes with that of the surrogate; it has no results to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.models import load_surrogate
from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.rewards.prm.model import PRM
from ttcfast.rewards.prm.network import PairNetwork
from ttcfast.rewards.prm.scorer import PRMScorer
from ttcfast.rewards.prm.sizes import make_prm
from ttcfast.spec import StochasticConfig

from . import timing
from .groups import compiled
from .targets import Target
from .timing import Case

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CPU_CASES = {"B256 64^2 zeros": (256, 64, "zeros"), "B256 64^2 periodic": (256, 64, "boundary")}
CUDA_CASES = CPU_CASES
TARGETS = (
    Target("B256 64^2 *", "seed, plain", "ratio", least=1.3),
    Target("B256 64^2 *", "seed, plain", "ratio", least=1.3, device="cuda"),
    Target("sizes", "surrogate", "ratio", least=2),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, (b, side, padding) in (CPU_CASES if device == "cpu" else CUDA_CASES).items():
        problem = Problem(*((5, 8) if tiny else (b, side)), padding, device)
        yield problem.case("prm", name, f"[{b}, 4, {side}, {side}]", "float32", problem.peers(tiny))
    shipped = Shipped(device, tiny)
    ways = {name: partial(Shipped.score, way=name) for name in Shipped.ways}
    yield shipped.case("prm", "shipped, 8 groups of 16", "[8, 16, 4, 64, 64]", "float32, bfloat16", ways, note=shipped.regret)
    yield Sizes(device, tiny).case("prm", "sizes", "[4, 16, 4, 64, 64]", "float32", {n: partial(Sizes.run, name=n) for n in Sizes.names})


class Sizes(timing.Problem):
    """64 candidates scored by reward models of several sizes, untrained except the shipped one, and 64 states through the surrogate."""

    names = ("PRM small", "PRM seed", "PRM surrogate", "DensePRM small", "shipped DensePRM", "surrogate")

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = device, tiny

    @cached_property
    def states(self) -> Tensor:
        side = 16 if self.tiny else 64
        return 1 + torch.rand(4, 4, side, side, generator=torch.Generator().manual_seed(1)).to(self.device)

    @cached_property
    def runs(self) -> dict[str, Callable[[], Tensor]]:
        group = self.states.unsqueeze(1) + 0.02 * torch.randn(4, 16, 4, *self.states.shape[2:], device=self.device)
        made = {name: make_prm(*_SIZE[name]) for name in self.names if name in _SIZE}
        made["shipped DensePRM"] = make_prm("dense", 8, "small") if self.tiny else PairNetwork.from_pretrained(EXAMPLES / "prm")
        scorers = {name: PRMScorer(network).to(self.device) for name, network in made.items()}
        found = {name: partial(scorer.score_group, self.states, group, None) for name, scorer in scorers.items()}
        fm = None if self.tiny else load_surrogate(EXAMPLES / "surrogate.safetensors", device=self.device)
        found["surrogate"] = partial(torch.square if fm is None else fm.deterministic, group.flatten(0, 1))
        return found

    @torch.no_grad()
    def run(self, name: str) -> Tensor:
        return self.runs[name]()

    def check(self, peers: dict[str, Callable[[Sizes], Tensor]]) -> None:
        torch.manual_seed(0)
        for name, run in peers.items():
            assert run(self).isfinite().all(), f"{name} is not finite"


_SIZE = {
    "PRM small": ("scalar", 8, "small"),
    "PRM seed": ("scalar", 8, "seed"),
    "PRM surrogate": ("scalar", 8, "surrogate"),
    "DensePRM small": ("dense", 8, "small"),
}


class Shipped(timing.Problem):
    """The shipped reward on candidates of the shipped surrogate; created on first use."""

    ways: Mapping[str, Mapping[str, Any]] = {
        "float32": {},
        "float32, channels last": {"channels_last": True},
        "bfloat16": {"dtype": torch.bfloat16},
        "bfloat16, channels last": {"dtype": torch.bfloat16, "channels_last": True},
    }

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = device, tiny

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor]:
        """Return states ``[N, 4, X, Y]`` and candidates ``[N, B, 4, X, Y]``."""
        if self.tiny:
            states = 1 + torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
            moved = states.unsqueeze(1) + 0.02 * torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
            return states.to(self.device), moved.to(self.device)
        from ttcfast.data import read_trajectories  # h5py, which a GPU machine may not have

        files = [EXAMPLES / "kelvin_helmholtz_test.hdf5", EXAMPLES / "riemann_curved_test.hdf5"]
        states = read_trajectories(files)[0][:, 5].to(self.device, torch.float32)
        fm, problems = load_surrogate(EXAMPLES / "surrogate.safetensors", device=self.device), torch.arange(len(states))
        # with dropout candidates the reward would pick the deterministic step in any precision, so there would be no regret
        noise = StochasticConfig(dropout=False, directions=str(EXAMPLES / "directions.safetensors"), directions_strength=0.0)
        with torch.no_grad():
            still, ids = fm.deterministic(states).unsqueeze(1), torch.arange(1, 16)
            drawn = fm.candidates(states, ids, problem_ids=problems, seed=0, step=5, stochastic=noise)
            return states, torch.cat([still, drawn], 1)

    @cached_property
    def scorers(self) -> dict[str, PRMScorer]:
        return {name: PRMScorer(self._network(), **options).to(self.device) for name, options in self.ways.items()}

    @torch.no_grad()
    def score(self, way: str) -> Tensor:
        return self.scorers[way].score_group(*self.groups, None)

    def check(self, peers: dict[str, Callable[[Shipped], Tensor]]) -> None:
        expected = self.score("float32").double()
        for way, score in peers.items():
            error = float((score(self).double() - expected).abs().max() / expected.abs().max())
            assert error < (0.1 if "bfloat16" in way else 1e-4), f"{way}: scores have relative error {error:.1e}"

    def regret(self) -> str:
        exact = self.score("float32").double()
        lost = exact.amax(1) - exact.gather(1, self.score("bfloat16").argmax(1, keepdim=True)).squeeze(1)
        relative = lost / (exact.amax(1) - exact.amin(1))
        return f"bfloat16: regret {float(relative.mean()):.1%} of the spread on average, {float(relative.max()):.1%} at worst"

    def _network(self) -> PairNetwork:
        if not self.tiny:
            return PairNetwork.from_pretrained(EXAMPLES / "prm")
        torch.manual_seed(0)
        network = DensePRM(8, width=4, levels=2)
        nn.init.normal_(network.out.weight, std=0.05)
        return network


class PlanPRM(nn.Module):
    """The network of TTC plan, "PRM Model", as printed."""

    def __init__(self, in_ch: int, width: int = 64, depth: int = 6, padding_mode: str = "zeros") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        ch = in_ch
        for _ in range(depth):
            layers += [nn.Conv2d(ch, width, 3, padding=1, padding_mode=padding_mode), nn.GELU()]
            ch = width
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))

    def forward(self, state_t: Tensor, cand_tp1: Tensor) -> Tensor:
        x = torch.cat([state_t, cand_tp1], dim=1)
        return self.head(self.trunk(x)).squeeze(-1)


class Problem(timing.Problem):
    """One state and its candidates; created on first use."""

    def __init__(self, b: int, side: int, padding: str, device: str) -> None:
        self.sizes, self.padding, self.device = (b, side), padding, device

    @cached_property
    def plain(self) -> PlanPRM:
        torch.manual_seed(0)
        return PlanPRM(8, padding_mode="zeros" if self.padding == "zeros" else "circular").eval().to(self.device)

    @cached_property
    def ours(self) -> PRM:
        prm = PRM(8, padding="zeros" if self.padding == "zeros" else "boundary").to(self.device)
        prm.load_state_dict(self.plain.state_dict())
        return prm

    @cached_property
    def state(self) -> Tensor:
        side = self.sizes[1]
        return 1 + torch.rand(1, 4, side, side, device=self.device, generator=self.generator(1))

    @cached_property
    def cand(self) -> Tensor:
        b, side = self.sizes
        noise = torch.randn(b, 4, side, side, device=self.device, generator=self.generator(2))
        return self.state + 0.02 * noise

    def peers(self, tiny: bool) -> dict[str, Callable[[Problem], Tensor]]:
        @cache
        def fused() -> Callable[..., Tensor]:
            return compiled(self.plain, tiny=tiny)

        return {
            "ttcfast": lambda p: p.score(None),
            "ttcfast, one chunk": lambda p: p.score(p.sizes[0]),
            "seed, plain": lambda p: p.scored_by(p.plain),
            "seed, torch.compile": lambda p: p.scored_by(fused()),
        }

    def check(self, peers: dict[str, Callable[[Problem], Tensor]]) -> None:
        with torch.no_grad():
            plain = PlanPRM(8, padding_mode=self.plain.trunk[0].padding_mode).to(self.device).double()  # type: ignore[arg-type]
            plain.load_state_dict(self.plain.state_dict())
            wide, cand = self.state.double(), self.cand.double()
            expected = torch.cat([plain(wide.expand_as(part), part) for part in cand.split(16)])
        for name, run in peers.items():
            error = (run(self).double() - expected).abs().max() / expected.abs().max()
            assert float(error) < 1e-5, f"{name}: scores have relative error {float(error):.1e}"

    @torch.no_grad()
    def score(self, chunk: int | None) -> Tensor:
        return PRMScorer(self.ours, chunk=chunk).score_group(self.state, self.cand.unsqueeze(0), None)[0]

    @torch.no_grad()
    def scored_by(self, model: Callable[..., Tensor]) -> Tensor:
        return model(self.state.expand_as(self.cand), self.cand)
