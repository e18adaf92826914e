"""The TTC plan's own loop against ``TTCGreedy``, on the shipped ViT and two foreign networks, and the ViT's forward alone.

* ``loop``: one step of B candidates. The plan copies the state B times, calls the
  network with ``nn.Dropout`` active, scores by its ``arm_score`` and takes the argmax. The gate gives both the same noise and compares
  their choices as docs/design/decisions.md ("Precision") says; the rows say in how many groups they are the same. "plain layers" is the
  plan's loop on the ViT as one would write it.
* ``loop bfloat16``: the same with ``Surrogate(dtype=torch.bfloat16)``, beside our step in float32, whose choices the gate compares. On CPUs
  with bfloat16 instructions; others emulate them slowly.
* ``loop compiled``: the same with ``Surrogate(compile=True)``; the plan's loop stays eager, as it is printed.
* ``forward``: B rows without noise as a surrogate calls its model, by the module itself, and with plain layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttcfast.core.base_fm import Surrogate
from ttcfast.evaluation.regret import MOST_RELATIVE_REGRET, choice_regret
from ttcfast.models import ViT, ViTConfig, load_surrogate
from ttcfast.models.fno import FNO, FNOConfig
from ttcfast.models.vit import Attention, rotary_angles
from ttcfast.ops import arm
from ttcfast.rewards.arm import ARMScorer
from ttcfast.spec import ARMWeights, StateSpec, TTCConfig
from ttcfast.stochastic_sampling import Draw, enable_mc_dropout, keyed_noise, noise_sites
from ttcfast.ttc.inference import TTCGreedy

from .bench_arm import plan
from .targets import Target
from .timing import Case

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SEED, STEP, GROUPS = 0, 1, 6
PLAN, PLAIN, MODULE = "the plan's loop", "the plan's loop, plain layers", "module"

CASES = {  # kind: (network, B)
    "loop": (("ViT", 5), ("ViT", 16), ("ViT", 64), ("ViT", 1024), ("FNO", 5), ("FNO", 64), ("U-Net", 5), ("U-Net", 64)),
    "loop compiled": (("ViT", 5), ("ViT", 64)),
    "loop bfloat16": (("ViT", 5), ("ViT", 64)),
    "forward": (("ViT", 4), ("ViT", 16)),
}
TARGETS = (
    Target("loop ViT B5", PLAIN, "ratio", least=1.3),
    Target("loop ViT B64", PLAIN, "ratio", least=1.8),
    Target("loop compiled ViT B5", PLAIN, "ratio", least=1.6),
    Target("loop compiled ViT B64", PLAIN, "ratio", least=2.2),
)


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    """On a CPU, where the forward is what a step costs."""
    for kind, settings in CASES.items() if device == "cpu" else ():
        if kind == "loop bfloat16" and not (tiny or torch.cpu._is_avx512_bf16_supported()):
            continue
        for network, b in settings:
            loop = Loop(network, min(b, 4) if tiny else b, tiny, kind == "loop compiled" and not tiny)
            if kind == "forward":
                peers: dict[str, Callable[[], Any]] = {"surrogate": loop.called, MODULE: loop.module, "plain layers": loop.plain_module}
            else:
                peers = {"TTCGreedy": loop.greedy, PLAN: partial(loop.plan, loop.shipped)}
                peers |= {PLAIN: partial(loop.plan, loop.plain)} if network == "ViT" else {}
                peers = {"bfloat16": loop.greedy_bfloat16, **peers} if kind == "loop bfloat16" else peers
            yield Case(
                "step",
                f"{kind} {network} B{b}",
                f"[1, {loop.b}, 4, {loop.side}, {loop.side}]",
                "float32",
                peers=peers,
                ours=next(iter(peers)),
                check={"forward": loop.check_forward, "loop bfloat16": loop.check_bfloat16}.get(kind, loop.check_loop),
                note=lambda loop=loop: loop.said,  # type: ignore[misc]
            )


class UNet(nn.Module):
    """Two levels with skip connections, GroupNorm and dropout, as foreign code writes them."""

    def __init__(self, width: int = 24, dropout: float = 0.02) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            first = nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="circular")
            return nn.Sequential(first, nn.GroupNorm(4, outputs), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(outputs, outputs, 3, padding=1))

        self.enter, self.down, self.deep = block(4, width), block(width, 2 * width), block(2 * width, 2 * width)
        self.up, self.leave = block(4 * width, width), block(2 * width, width)
        self.out = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enter(x)
        b = self.down(F.avg_pool2d(a, 2))
        c = F.interpolate(self.deep(F.avg_pool2d(b, 2)), scale_factor=2)
        d = F.interpolate(self.up(torch.cat([b, c], 1)), scale_factor=2)
        return self.out(self.leave(torch.cat([a, d], 1)))


class Loop:
    """A state of the shipped test data, a network as a surrogate, and the plan's loop on the same network; created on first use."""

    def __init__(self, network: str, b: int, tiny: bool, compile: bool) -> None:
        self.network, self.b, self.tiny, self.compile, self.side = network, b, tiny, compile, 8 if tiny else 64
        self.said, self._turn = "", 0

    @cached_property
    def fm(self) -> Surrogate:
        torch.manual_seed(0)
        grid, spec = (self.side, self.side), StateSpec.euler2d(cell_volume=1 / self.side**2)
        if self.network == "ViT" and not self.tiny:
            fm = load_surrogate(EXAMPLES / "surrogate.safetensors")
        else:
            made: dict[str, Callable[[], nn.Module]] = {
                "ViT": lambda: ViT(ViTConfig(grid=grid, width=16, depth=2, heads=2, refine=4)),
                "FNO": lambda: FNO(FNOConfig(channels=4, grid=grid, modes=self.side // 4, width=8 if self.tiny else 32)),
                "U-Net": lambda: UNet(8 if self.tiny else 24),
            }
            model = made[self.network]()
            nn.init.normal_(model.out.weight, std=0.001)  # type: ignore[union-attr, arg-type]
            fm = Surrogate(model, spec, predicts="delta")
        return fm.variant(compile=self.compile, stochastic={})

    @cached_property
    def states(self) -> Tensor:
        """Return ``[GROUPS, 4, X, Y]``."""
        if self.tiny:
            lowest = torch.tensor([1.0, 0.0, 0.0, 2.5]).reshape(4, 1, 1)
            return lowest + 0.1 * torch.rand(GROUPS, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        from ttcfast.data import read_trajectories

        fields, _ = read_trajectories([EXAMPLES / "kelvin_helmholtz_test.hdf5", EXAMPLES / "riemann_curved_test.hdf5"])
        return fields[torch.arange(GROUPS) % len(fields), 3 + torch.arange(GROUPS)].float()

    @cached_property
    def spec(self) -> StateSpec:
        mask = torch.zeros(self.side, self.side, dtype=torch.bool)
        mask[[0, -1]] = mask[:, [0, -1]] = True
        return StateSpec.euler2d(cell_volume=1 / self.side**2, boundary_mask=mask)

    @cached_property
    def _scorer(self) -> ARMScorer:
        return ARMScorer(ARMWeights(), spec=self.spec, scale="absolute", momentum="sum")

    @cached_property
    def _greedy(self) -> TTCGreedy:
        return TTCGreedy(self.fm, self._scorer, TTCConfig(branching_factor=self.b, seed=SEED))

    @cached_property
    def _bfloat16(self) -> TTCGreedy:
        return TTCGreedy(self.fm.variant(dtype=torch.bfloat16), self._scorer, TTCConfig(branching_factor=self.b, seed=SEED))

    @cached_property
    def _masked(self) -> Tensor:
        assert self.spec.boundary_mask is not None
        return self.spec.boundary_mask.flatten().nonzero().squeeze(1)

    @cached_property
    def shipped(self) -> nn.Module:
        return enable_mc_dropout(copy.deepcopy(self.fm.model))

    @cached_property
    def plain(self) -> nn.Module:
        return enable_mc_dropout(plain_layers(self.fm.model))

    @cached_property
    def _plain_still(self) -> nn.Module:
        return plain_layers(self.fm.model)

    @cached_property
    def _rows(self) -> Tensor:
        return self.fm._encode(self.states[:1]).repeat_interleave(self.b, 0)

    def greedy(self) -> Tensor:
        return self._greedy.step_from(self.states[:1], step=STEP).state

    def greedy_bfloat16(self) -> Tensor:
        # A new state each time, as a rollout has it: the deterministic step of the one before would not be computed again.
        self._turn += 1
        return self._bfloat16.step_from(self.states[self._turn % 2 :][:1], step=STEP).state

    @torch.no_grad()
    def plan(self, model: nn.Module) -> Tensor:
        x = self.states[:1]
        copies = self.fm._encode(x).repeat_interleave(self.b, 0)
        return self._chosen(x, self._decoded(model(copies), x))[1]

    def _decoded(self, out: Tensor, x: Tensor) -> Tensor:
        return self.fm._decoded(out, x.unsqueeze(1).expand(1, len(out), *x.shape[1:]))

    def _chosen(self, x: Tensor, candidates: Tensor) -> tuple[int, Tensor]:
        best = int(plan(x, candidates, self._masked, 1 / self.side**2).argmax())
        return best, candidates[:, best]

    @torch.no_grad()
    def called(self) -> Tensor:
        return self.fm._candidates.deterministic(self._rows, lambda out: out)

    @torch.no_grad()
    def module(self) -> Tensor:
        return self.fm.model(self._rows)

    @torch.no_grad()
    def plain_module(self) -> Tensor:
        return self._plain_still(self._rows)

    def check_forward(self) -> None:
        expected = self.plain_module()
        for run in (self.called, self.module):
            torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def check_loop(self) -> None:
        """Run the plan's loop with keyed noise and the deterministic step as candidate 0, and compare its choices with ours."""
        model, same = plain_layers(self.fm.model) if self.network == "ViT" else copy.deepcopy(self.fm.model), 0
        rows = torch.stack([torch.zeros(self.b - 1, dtype=torch.int64), torch.arange(1, self.b)], 1)
        for x in self.states.split(1):
            encoded = self.fm._encode(x)
            with keyed_noise(model, noise_sites(model, self.fm.stochastic), Draw.of(SEED, STEP, rows)):
                noisy = model(encoded.repeat_interleave(self.b - 1, 0))
            candidates = self._decoded(torch.cat([model(encoded), noisy]), x)
            scores = arm(x.double(), candidates.double(), self.spec, ARMWeights(), backend="reference", momentum="sum").score[0]
            theirs, ours = self._chosen(x, candidates)[0], int(self._greedy.step_from(x, step=STEP).chosen[0])
            same += theirs == ours
            if not scores[theirs] - scores[ours] <= MOST_RELATIVE_REGRET * (scores.max() - scores.min()):
                raise AssertionError(f"the plan's loop chooses candidate {theirs} and ours {ours}; scores {scores.tolist()}")
        self.said = f"same choice in {same} of {GROUPS} groups, regret at most {MOST_RELATIVE_REGRET:.0%}"
        print(f"  {self.said}")

    def check_bfloat16(self) -> None:
        """Compare choices as ``choice_regret`` does, and the loop's as ``check_loop`` does."""
        self.check_loop()
        cfg = TTCConfig(branching_factor=self.b, seed=SEED)
        regret = choice_regret(self.fm, self._bfloat16.fm, self._scorer, self.states.unsqueeze(1), cfg)
        self.said = f"bfloat16 beside float32: {regret}"
        print(f"  {self.said}")
        if not regret.worst <= MOST_RELATIVE_REGRET:
            raise AssertionError(f"{self.said}; at most {MOST_RELATIVE_REGRET:.0%} is allowed")


def plain_layers(model: nn.Module) -> nn.Module:
    """Return a copy of the ViT with layers as one would write them: axes as they come, queries and keys rotated one after the other."""
    assert isinstance(model, ViT)
    plain = copy.deepcopy(model)

    def forward(self: ViT, x: Tensor) -> Tensor:
        z = self.embed(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            z = block(z)
        fine = F.pixel_shuffle(self.unpatch(self.norm(z)).permute(0, 3, 1, 2), self.config.patch)
        return self.out(F.gelu(self.mix(torch.cat([fine, x], 1))))

    def attend(angles: Tensor, self: Attention, z: Tensor) -> Tensor:
        n, x, y, d = z.shape
        cos, sin = angles.cos(), angles.sin()

        def rotated(q: Tensor) -> Tensor:
            a, b = q.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

        q, k, v = self.qkv(z).reshape(n, x * y, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v)
        return self.project(mixed.transpose(1, 2).reshape(n, x, y, d))

    config = plain.config
    tokens = (config.grid[0] // config.patch, config.grid[1] // config.patch)
    angles = rotary_angles(tokens, config.periodic, config.width // config.heads)
    plain.forward = MethodType(forward, plain)  # type: ignore[method-assign]
    for module in plain.modules():
        if isinstance(module, Attention):
            module.forward = MethodType(partial(attend, angles), module)  # type: ignore[method-assign]
    return plain
