"""A test-time computing step on the shipped surrogate (ViT, 64x64): its cost by part, its dropout, reduced precision.

* ``shares``: the whole step, its candidates alone, and the step on precomputed candidates, which leaves scores (ARM), selection and the
  controller.
* ``dropout``: the model on all rows with keyed dropout, with ``nn.Dropout`` active, and without dropout.
* ``arithmetic``: the whole step in float32 and bfloat16, eager and compiled. The gate compares their choices, teacher-forced with the same
  keys (see docs/design/decisions.md ("Precision")), and prints the regret. CPUs without bfloat16 instructions emulate it slowly.
* ``recorded``, on a GPU: a rollout whose steps are launched one kernel at a time, and one that records its third as a CUDA graph.
* ``loop``, ``loop compiled``, ``forward``, on a CPU: see ``step_loop.py``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.core.base_fm import Surrogate, candidate_rows
from ttcfast.evaluation.regret import MOST_RELATIVE_REGRET, choice_regret
from ttcfast.models import ViT, ViTConfig, load_surrogate
from ttcfast.rewards.arm import ARMScorer
from ttcfast.spec import ARMWeights, StateSpec, TTCConfig
from ttcfast.stochastic_sampling import Draw, Site, keyed_noise, mc_dropout, noise_sites
from ttcfast.ttc.inference import TTCGreedy

from . import step_loop
from .targets import Target
from .timing import Case

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SEED, STEP = 0, 1  # not step 0, in which a rollout also checks that candidates differ
STEPS = 32  # of a rollout
SHIPPED = {"latent_sigma": 0.01}  # as in the shipped configuration, with dropout

# Peers by kind of case, ours first, with the method of Setting that each calls; tiny cases omit those that compile.
PEERS = {
    "shares": {"whole step": "step", "generate": "generate", "score and select": "choose"},
    "dropout": {"keyed dropout": "keyed", "nn.Dropout": "dropout", "no dropout": "plain"},
    "arithmetic": {
        "float32": "step",
        "float32, compiled": "step_compiled",
        "bfloat16": "step_bfloat16",
        "bfloat16, compiled": "step_bfloat16_compiled",
    },
    "recorded": {"recorded": "rollout_recorded", "launched": "rollout"},
}

TARGETS = (
    Target("shares*", "score and select", "ratio", most=0.05),
    Target("shares*", "score and select", "ratio", most=0.05, device="cuda"),
    Target("dropout*", "nn.Dropout", "ratio", least=1 / 1.1),
    Target("dropout*", "nn.Dropout", "ratio", least=1 / 1.1, device="cuda"),
    *step_loop.TARGETS,
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    sizes = {"cpu": ((1, 16), (8, 8)), "cuda": ((1, 64), (8, 128))}[device]
    for n, b in ((1, 4),) if tiny else sizes:
        yield _case("shares", "", Setting(n, b, device, tiny))
    n, b = (2, 4) if tiny else sizes[0]
    yield _case("dropout", "", Setting(n, b, device, tiny, {}))
    yield _case("arithmetic", "", Setting(n, min(b, 8) if device == "cpu" else b, device, tiny))
    if device == "cuda":
        yield _case("recorded", "", Setting(n, b, device, tiny))
    yield from step_loop.cases(device, tiny=tiny)


def _case(kind: str, what: str, setting: Setting) -> Case:
    peers = {name: method for name, method in PEERS[kind].items() if not (setting.tiny and "compiled" in name)}
    cells = ", ".join(map(str, setting.grid))
    return Case(
        "step",
        f"{kind} N{setting.n} B{setting.b}{what}",
        f"[{setting.n}, {setting.b}, 4, {cells}]",
        "float32",
        peers={name: getattr(setting, method) for name, method in peers.items()},
        ours=next(iter(peers)),
        check=getattr(setting, f"check_{kind}"),
        device=setting.device,
    )


class Made:
    """A surrogate that returns precomputed candidates."""

    def __init__(self, fm: Surrogate, x: Tensor, ids: Tensor) -> None:
        self.spec = fm.spec
        self._first, self._others = fm.deterministic(x), fm.candidates(x, ids, seed=SEED, step=STEP)

    def deterministic(self, x: Tensor) -> Tensor:
        return self._first

    def candidates(self, x: Tensor, ids: Tensor, **options: Any) -> Tensor:
        return self._others


class Setting:
    """N states of the shipped test data, the shipped surrogate and a controller with B candidates; created on first use."""

    def __init__(self, n: int, b: int, device: str, tiny: bool, noise: Mapping[str, Any] | None = None) -> None:
        self.n, self.b, self.device, self.tiny = n, b, device, tiny
        self.noise = dict(SHIPPED if noise is None else noise)
        self.grid = (8, 8) if tiny else (64, 64)

    @cached_property
    def fm(self) -> Surrogate:
        if self.tiny:
            torch.manual_seed(0)
            model = ViT(ViTConfig(grid=self.grid, width=16, depth=3, heads=2, refine=4, dropout=0.1))
            nn.init.normal_(model.out.weight, std=0.01)
            fm = Surrogate(model, StateSpec.euler2d(), predicts="delta").to(self.device)
        else:
            fm = load_surrogate(EXAMPLES / "surrogate.safetensors", device=self.device)
        return fm.variant(stochastic=self.noise)

    @cached_property
    def trajectories(self) -> Tensor:
        """Return frames of shipped trajectories, ``[N, T, 4, X, Y]``."""
        if self.tiny:
            lowest = torch.tensor([1.0, 0.0, 0.0, 2.5]).reshape(4, 1, 1)
            frames = lowest + 0.1 * torch.rand(self.n, 4, 4, *self.grid, generator=torch.Generator().manual_seed(1))
            return frames.to(self.device)
        from ttcfast.data import read_trajectories  # h5py, which a GPU machine may not have

        files = [EXAMPLES / "kelvin_helmholtz_test.hdf5", EXAMPLES / "riemann_curved_test.hdf5"]
        fields, _ = read_trajectories(files)
        return fields[torch.arange(self.n) * 4 % 7].to(self.device, torch.float32)

    @cached_property
    def x(self) -> Tensor:
        return self.trajectories[:, min(5, self.trajectories.shape[1] - 1)].contiguous()

    @cached_property
    def ids(self) -> Tensor:
        return torch.arange(1, self.b)  # candidate 0 is the deterministic step

    @cached_property
    def scorer(self) -> ARMScorer:
        return ARMScorer(ARMWeights(), None, spec=self.fm.spec, scale="relative", momentum="components")

    def controller(self, fm: Any) -> TTCGreedy:
        return TTCGreedy(fm, self.scorer, TTCConfig(branching_factor=self.b, seed=SEED))

    @cached_property
    def _steps(self) -> dict[str, Callable[[], Any]]:
        bfloat16 = self.fm.variant(dtype=torch.bfloat16)
        ways = {
            "as it is": self.fm,
            "made": Made(self.fm, self.x, self.ids),
            "bfloat16": bfloat16,
            "compiled": self.fm.variant(compile=True),
            "bfloat16, compiled": bfloat16.variant(compile=True),
        }
        return {name: _stepping(self.controller(fm), self.x) for name, fm in ways.items()}

    def step(self) -> Any:
        return self._steps["as it is"]()

    def choose(self) -> Any:
        return self._steps["made"]()

    def step_bfloat16(self) -> Any:
        return self._steps["bfloat16"]()

    def step_compiled(self) -> Any:
        return self._steps["compiled"]()

    def step_bfloat16_compiled(self) -> Any:
        return self._steps["bfloat16, compiled"]()

    @cached_property
    def _recording(self) -> TTCGreedy:
        return self.controller(self.fm.variant(graph=True))

    def rollout(self) -> Tensor:
        return self.controller(self.fm).rollout(self.x, STEPS)

    def rollout_recorded(self) -> Tensor:
        return self._recording.rollout(self.x, STEPS)

    def generate(self) -> tuple[Tensor, Tensor]:
        return self.fm.deterministic(self.x), self.candidates()

    def candidates(self) -> Tensor:
        return self.fm.candidates(self.x, self.ids, seed=SEED, step=STEP)

    @cached_property
    def _rows(self) -> tuple[Tensor, list[Site], Draw]:
        """Return the normalised inputs of all rows, the noise sites, and the draw of all rows."""
        rows = candidate_rows(self.ids, None, self.n, self.device)
        encoded = self.fm._encode(self.x).repeat_interleave(len(self.ids), 0)
        return encoded, noise_sites(self.fm.model, self.fm.stochastic), Draw.of(SEED, STEP, rows)

    @torch.no_grad()
    def keyed(self) -> Tensor:
        encoded, sites, draw = self._rows
        draw.start(draw.rows, draw.stream)
        with keyed_noise(self.fm.model, sites, draw):
            return self.fm.model(encoded)

    @cached_property
    def _copy(self) -> nn.Module:
        return copy.deepcopy(self.fm.model)

    @torch.no_grad()
    def dropout(self) -> Tensor:
        with mc_dropout(self._copy):
            return self._copy(self._rows[0])

    @torch.no_grad()
    def plain(self) -> Tensor:
        return self.fm.model(self._rows[0])

    def check_shares(self) -> None:
        whole, chosen = self.step(), self.choose()
        first, others = self.generate()
        group = torch.cat([first.unsqueeze(1), others], 1)
        picked = group[torch.arange(self.n), whole.chosen]
        if not (torch.equal(whole.state, picked) and torch.equal(chosen.state, picked) and torch.equal(chosen.scores, whole.scores)):
            raise AssertionError("the parts of the step do not reproduce the step")

    def check_dropout(self) -> None:
        """Check dropout, whose random masks differ: it must change the output by as much in either way, and not at all when off."""
        plain = self.plain()
        sizes = [float((run() - plain).square().mean().sqrt()) for run in (self.keyed, self.dropout)]
        if not 0.5 < sizes[0] / sizes[1] < 2:
            raise AssertionError(f"dropout moves the output by {sizes[0]:.3g} (keyed) and {sizes[1]:.3g} (nn.Dropout)")

    def check_recorded(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # that nothing could be recorded
            torch.testing.assert_close(self.rollout_recorded(), self.rollout(), rtol=0, atol=0)

    def check_arithmetic(self) -> None:
        states = self.trajectories[:, 2:4] if self.tiny else self.trajectories[:, 2:20:6]
        cheap = {"bfloat16": {"dtype": torch.bfloat16}}
        if not self.tiny:
            cheap |= {"float32, compiled": {"compile": True}, "bfloat16, compiled": {"compile": True, "dtype": torch.bfloat16}}
        for name, options in cheap.items():
            cfg = TTCConfig(branching_factor=self.b, seed=SEED)
            regret = choice_regret(self.fm, self.fm.variant(**options), self.scorer, states, cfg)
            print(f"  {name} beside float32: {regret}")
            if not regret.worst <= MOST_RELATIVE_REGRET:
                raise AssertionError(f"{name}: {regret}; at most {MOST_RELATIVE_REGRET:.0%} is allowed")


def _stepping(controller: TTCGreedy, x: Tensor) -> Callable[[], Any]:
    return lambda: controller.step_from(x, step=STEP)
