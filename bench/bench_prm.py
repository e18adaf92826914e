"""Scoring candidates by the seed's reward model: ``PRMScorer`` against the seed's plain forward on the same weights.

* ``seed, plain``: the seed's section 5 as it stands: state expanded, concatenated, all candidates at once.
* ``seed, torch.compile``: the same compiled.
* ``ttcfast, one chunk``: what is saved by linearity alone.

All compute in float32 and agree to rounding. ``zeros`` is the seed's padding and opens its state dict; ``periodic`` pads as the data's
boundary does, where the seed's net stands with ``padding_mode="circular"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ttcfast.rewards.prm.model import PRM
from ttcfast.rewards.prm.scorer import PRMScorer

from .groups import compiled
from .targets import Target
from .timing import Case

CPU_CASES = {"B256 64^2 zeros": (256, 64, "zeros"), "B256 64^2 periodic": (256, 64, "boundary")}
CUDA_CASES = CPU_CASES
TARGETS = (
    Target("B256 64^2 *", "seed, plain", "ratio", least=1.3),
    Target("B256 64^2 *", "seed, plain", "ratio", least=1.3, device="cuda"),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    for name, (b, side, padding) in (CPU_CASES if device == "cpu" else CUDA_CASES).items():
        problem = Problem(*((5, 8) if tiny else (b, side)), padding, device)
        peers = problem.peers(tiny)
        yield Case(
            "prm",
            name,
            f"[{b}, 4, {side}, {side}]",
            "float32",
            peers=peers,
            ours="ttcfast",
            check=partial(problem.check, peers),
            device=device,
        )


class SeedPRM(nn.Module):
    """The seed's section 5."""

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


class Problem:
    """One state and its candidates; made at first use."""

    def __init__(self, b: int, side: int, padding: str, device: str) -> None:
        self.sizes, self.padding, self.device = (b, side), padding, device

    @cached_property
    def seed(self) -> SeedPRM:
        torch.manual_seed(0)
        return SeedPRM(8, padding_mode="zeros" if self.padding == "zeros" else "circular").eval().to(self.device)

    @cached_property
    def ours(self) -> PRM:
        prm = PRM(8, padding="zeros" if self.padding == "zeros" else "boundary").to(self.device)
        prm.load_state_dict(self.seed.state_dict())
        return prm

    @cached_property
    def state(self) -> Tensor:
        side = self.sizes[1]
        return 1 + torch.rand(1, 4, side, side, device=self.device, generator=torch.Generator(self.device).manual_seed(1))

    @cached_property
    def cand(self) -> Tensor:
        b, side = self.sizes
        noise = torch.randn(b, 4, side, side, device=self.device, generator=torch.Generator(self.device).manual_seed(2))
        return self.state + 0.02 * noise

    def peers(self, tiny: bool) -> dict[str, Callable[[], Tensor]]:
        return {
            "ttcfast": partial(self._score, None),
            "ttcfast, one chunk": partial(self._score, self.sizes[0]),
            "seed, plain": partial(self._plain, lambda: self.seed),
            "seed, torch.compile": partial(self._plain, lambda: self._compiled(tiny)),
        }

    def check(self, peers: dict[str, Callable[[], Tensor]]) -> None:
        with torch.no_grad():
            seed = SeedPRM(8, padding_mode=self.seed.trunk[0].padding_mode).to(self.device).double()  # type: ignore[arg-type]
            seed.load_state_dict(self.seed.state_dict())
            wide, cand = self.state.double(), self.cand.double()
            expected = torch.cat([seed(wide.expand_as(part), part) for part in cand.split(16)])
        for name, run in peers.items():
            error = (run().double() - expected).abs().max() / expected.abs().max()
            assert float(error) < 1e-5, f"{name}: scores off by {float(error):.1e} of their size"

    @torch.no_grad()
    def _score(self, chunk: int | None) -> Tensor:
        return self._scorer(chunk).score_group(self.state, self.cand.unsqueeze(0), None)[0]

    def _scorer(self, chunk: int | None) -> PRMScorer:
        return PRMScorer(self.ours, chunk=chunk)

    @torch.no_grad()
    def _plain(self, model: Callable[[], Callable[..., Tensor]]) -> Tensor:
        return model()(self.state.expand_as(self.cand), self.cand)

    def _compiled(self, tiny: bool) -> Callable[..., Tensor]:
        if not hasattr(self, "_made"):
            self._made = compiled(self.seed, tiny=tiny)
        return self._made
