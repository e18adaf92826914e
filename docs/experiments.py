"""Experiments of docs/experiments.md that are no rows of ``ttcfast run_ttc``.

    python docs/experiments.py moves data/wide64 12          # signals that could tell where a reward's moves help
    python docs/experiments.py solver data/euler64 12        # the solver's step among, and moved by, the reward
    python docs/experiments.py trajectories data/euler64 16  # means of whole rollouts
    python docs/experiments.py controls data/euler64 64 runs/full runs/finetune/surrogate.safetensors  # rewards (folders) and surrogates
    python docs/experiments.py symmetries data/wide64 16     # projection, moves, the mean over symmetries, and both
    python docs/experiments.py ratios runs/x prm_symmetry+p prm_corrector+p  # of two rows of a run at the last step
    python docs/experiments.py grown surrogate.safetensors 5 # the shipped surrogate with five more blocks, which do nothing yet

All but the last two take ``open_trajectories(data, split="test").spread(n)``, 16 steps and projection onto the totals. A last argument of
moves, solver, trajectories and symmetries names another reward than examples/prm, such as that folder of commit 7d1c7a1, "the earlier
reward".
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from ttcfast import Blend, Ensemble, SolverStep, TTCConfig, TTCGreedy
from ttcfast.data import TrajectorySet, open_trajectories
from ttcfast.evaluation.baselines import baseline_rollout
from ttcfast.metrics import rollout_mse
from ttcfast.models import load_surrogate
from ttcfast.models.checkpoint import save_surrogate
from ttcfast.models.grid_solvers import GridSolver, solver_of
from ttcfast.models.vit import ViT
from ttcfast.rewards.prm.scorer import PRMScorer
from ttcfast.rewards.residual import EulerResidualScorer
from ttcfast.runtime import checkpoints
from ttcfast.states.symmetry import Frames
from ttcfast.ttc.projection import project

STEPS, SYMMETRIES = 16, 8
KEPT: dict[str, Any] = {"project": "conservation"}
TURNED: dict[str, Any] = {"branching_factor": SYMMETRIES, "stochastic": {"dropout": False, "symmetry": True}}


class Lab:
    """Problems of a data set with the shipped surrogate, reward and residual."""

    def __init__(self, root: str, count: int, reward: str = "examples/prm") -> None:
        self.data: TrajectorySet = open_trajectories(root, split="test")
        self.truth, self.fm = self.data.spread(count).stack(), load_surrogate("examples/surrogate.safetensors")
        self.fm.spec, self.x0 = self.data.spec, self.truth[:, 0]
        self.prm = PRMScorer(reward, spec=self.fm.spec)
        step = float(self.data.times[1] - self.data.times[0])
        self.residual = EulerResidualScorer(step, self.data.files[0].spacing, spec=self.fm.spec)
        assert self.fm.normalizer is not None
        self.scale, self.unit = self.fm.normalizer.std, self.fm.normalizer.delta_std.view(-1, 1, 1)

    def solver(self) -> GridSolver:
        return solver_of(self.data, self.fm.spec, work=len(self.truth) * STEPS)

    def each(self, trajectory: Tensor) -> Tensor:
        return rollout_mse(trajectory, self.truth[:, : STEPS + 1], scale=self.scale)[:, STEPS]

    def error(self, trajectory: Tensor) -> float:
        return float(self.each(trajectory).mean())

    def kept(self, x: Tensor, y: Tensor) -> Tensor:
        return project("conservation", x, y, self.fm.spec)[0]


def moved(steps: int) -> dict[str, Any]:
    return {**KEPT, "select": "mean", "refine_steps": steps, "refine_lengths": (1.0,), "trust": None}


def solver(lab: Lab) -> None:
    """Print the error over that of the projected deterministic rollout, of ways to use the solver's step with the reward."""
    alone = SolverStep(lab.solver(), lab.fm.spec)
    three, two = Blend([lab.fm, alone], weights=[1, 3]), Ensemble([lab.fm, alone])
    pair: dict[str, Any] = {**KEPT, "branching_factor": 2, "stochastic": {"dropout": False}}
    base = lab.error(baseline_rollout("deterministic", lab.fm, lab.x0, STEPS, TTCConfig(**KEPT)).trajectory)
    ways = {
        "solver": (alone, TTCConfig(branching_factor=1, **KEPT)),
        "moved once": (alone, TTCConfig(branching_factor=1, **moved(1))),
        "moved twice": (alone, TTCConfig(branching_factor=1, **moved(2))),
        "three quarters solver, moved twice": (three, TTCConfig(branching_factor=1, **moved(2))),
        "choice of the reward": (two, TTCConfig(**pair)),
        "best point between": (two, TTCConfig(select="span", **pair)),
    }
    for name, (model, config) in ways.items():
        print(f"{name}: {lab.error(TTCGreedy(model, lab.prm, config).rollout(lab.x0, STEPS)) / base:.2f}")


def trajectories(lab: Lab) -> None:
    """Print the error over the deterministic rollout's, of means of the solver's rollout and that of the corrected symmetries."""
    solved = lab.solver().rollout(lab.x0, STEPS, lab.data.shape[0])
    ours = TTCGreedy(lab.fm, lab.prm, TTCConfig(**TURNED, **moved(2))).rollout(lab.x0, STEPS)
    base = lab.error(baseline_rollout("deterministic", lab.fm, lab.x0, STEPS, TTCConfig()).trajectory)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        print(f"{share} of the solver: {lab.error(torch.lerp(ours, solved, share)) / base:.2f}")


def symmetries(lab: Lab) -> None:
    """Print the error over the deterministic rollout's of projection, moves, the mean over symmetries and both, with 95 % intervals."""
    ways = {
        "deterministic": baseline_rollout("deterministic", lab.fm, lab.x0, STEPS, TTCConfig()).trajectory,
        "projection": baseline_rollout("deterministic", lab.fm, lab.x0, STEPS, TTCConfig(**KEPT)).trajectory,
        "corrector": TTCGreedy(lab.fm, lab.prm, TTCConfig(branching_factor=1, **moved(2))).rollout(lab.x0, STEPS),
        "symmetries": baseline_rollout("mean", lab.fm, lab.x0, STEPS, TTCConfig(**KEPT, **TURNED)).trajectory,
        "both": TTCGreedy(lab.fm, lab.prm, TTCConfig(**TURNED, **moved(2))).rollout(lab.x0, STEPS),
    }
    errors = {name: lab.each(trajectory) for name, trajectory in ways.items()}
    for name, error in errors.items():
        print(f"{name}: {over(error, errors['deterministic'])}")


def ratios(run: str, ours: str, base: str) -> None:
    """Print the error of one row of a run over that of another at the last step; ``+p`` behind a name means with projection."""
    held = json.loads((Path(run) / "rows.json").read_text())["results"]
    rows = {row["method"] + "+p" * bool(row["projected"]): torch.tensor(row["mse"], dtype=torch.float64)[:, -1] for row in held}
    print(f"{ours} over {base}: {over(rows[ours], rows[base])}")


def over(ours: Tensor, base: Tensor) -> str:
    """Return the ratio of mean errors ``[N]`` in words, with its 95 % interval by the bootstrap over problems."""
    picks = torch.randint(len(ours), (10_000, len(ours)), generator=torch.Generator().manual_seed(0))
    each = ours[picks].mean(1) / base[picks].mean(1)
    low, high = each.quantile(torch.tensor([0.025, 0.975], dtype=each.dtype)).tolist()
    return f"{float(ours.mean() / base.mean()):.2f} [{low:.2f}, {high:.2f}]"


@torch.no_grad()
def moves(lab: Lab) -> None:
    """Print rank correlations, within each step, of signals with the best length of the mean move, along the moved rollout."""
    found: dict[str, list[Tensor]] = {}
    x, n, spec = lab.x0, len(lab.x0), lab.fm.spec
    for t in range(STEPS):
        frames = Frames(spec, x.shape[2:], torch.arange(SYMMETRIES).expand(n, -1), torch.arange(n), seed=0, step=t)
        seen = frames.into(x.unsqueeze(1).expand(n, SYMMETRIES, *x.shape[1:])).flatten(0, 1)
        stages = [lab.fm.deterministic(seen)]
        for _ in range(2):
            stages.append(stages[-1] + lab.prm.ascent(seen, lab.kept(seen, stages[-1]).unsqueeze(1))[:, 0])
        each = [frames.back(y.unflatten(0, (n, SYMMETRIES))) / lab.unit for y in stages]
        means = [y.mean(1) for y in each]
        size = lambda y: y.square().flatten(1).mean(1)  # noqa: E731
        spread = [size((y - mean.unsqueeze(1)).flatten(1)) for y, mean in zip(each, means)]
        move = means[2] - means[0]
        options = torch.stack([lab.kept(x, mean * lab.unit) for mean in means], 1)
        residual, score = lab.residual.score(x, options), lab.prm.score(x, options)
        signals = {
            "best length": ((lab.truth[:, t + 1] / lab.unit - options[:, 0] / lab.unit) * move).flatten(1).mean(1) / size(move),
            "change of the residual": residual[:, 2] - residual[:, 0],
            "disagreement of the moves": size(((each[2] - each[0]) - move.unsqueeze(1)).flatten(1)) / size(move),
            "spread after over before": spread[2] / spread[0],
            "second move over first": size(means[2] - means[1]) / size(means[1] - means[0]),
            "size of the move": size(move),
            "score before": score[:, 0],
        }
        for name, value in signals.items():
            found.setdefault(name, []).append(value)
        x = options[:, 2]
    length = found.pop("best length")
    print(f"best length: {float(torch.stack(length).mean()):.2f} on average, {float(torch.stack(length)[-1].mean()):.2f} at the last step")
    for name, values in found.items():
        within = [spearmanr(value, best).statistic for value, best in zip(values, length)]
        print(f"{name}: {sum(within) / len(within):+.2f}")


def controls(lab: Lab, *found: str) -> None:
    """Print errors over that of the projected deterministic rollout, with 95 % intervals: two moves of rewards, and surrogates alone."""
    each = {"shipped": lab.each(baseline_rollout("deterministic", lab.fm, lab.x0, STEPS, TTCConfig(**KEPT)).trajectory)}
    for path in found:
        if path.endswith(".safetensors"):
            fm = load_surrogate(path)
            fm.spec = lab.fm.spec
            each[path] = lab.each(baseline_rollout("deterministic", fm, lab.x0, STEPS, TTCConfig(**KEPT)).trajectory)
        else:
            reward = PRMScorer(path, spec=lab.fm.spec)
            each[path] = lab.each(TTCGreedy(lab.fm, reward, TTCConfig(branching_factor=1, **moved(2))).rollout(lab.x0, STEPS))
    for path, error in each.items():
        print(f"{path}: {over(error, each['shipped'])}")


def grown(path: str, blocks: int) -> None:
    """Write the shipped surrogate with more blocks, whose outputs are zero: the same function, to be trained further."""
    surrogate, meta = load_surrogate("examples/surrogate.safetensors"), checkpoints.load("examples/surrogate.safetensors")[1]
    small = surrogate.model
    assert isinstance(small, ViT)
    large = ViT(replace(small.config, depth=small.config.depth + blocks))
    large.load_state_dict(small.state_dict(), strict=False)
    for block in large.blocks[small.config.depth :]:
        for layer in (block.local, block.attention.project, block.mlp[2]):  # type: ignore[union-attr, index]
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type, union-attr]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type, union-attr]
    x = torch.randn(1, small.config.channels, *small.config.grid)
    assert torch.equal(large.eval()(x), small.eval()(x))
    save_surrogate(path, large, meta | {"model": asdict(large.config)})
    print(f"{path}: {sum(p.numel() for p in large.parameters())} parameters, {sum(p.numel() for p in small.parameters())} before")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 4 and sys.argv[1] == "grown":
        sys.exit(grown(sys.argv[2], int(sys.argv[3])))
    if len(sys.argv) == 5 and sys.argv[1] == "ratios":
        sys.exit(ratios(*sys.argv[2:]))
    if len(sys.argv) > 4 and sys.argv[1] == "controls":
        sys.exit(controls(Lab(sys.argv[2], int(sys.argv[3])), *sys.argv[4:]))
    known = {"moves": moves, "solver": solver, "trajectories": trajectories, "symmetries": symmetries}
    if len(sys.argv) not in (4, 5) or sys.argv[1] not in known:
        sys.exit(__doc__)
    known[sys.argv[1]](Lab(sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
