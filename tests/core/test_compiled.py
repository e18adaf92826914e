"""Compiled candidates. What is recorded, and when anew, is tested with a backend that compiles nothing."""

import pytest
import torch
from torch import Tensor, nn

from tests.surrogates import DropNet, draw, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.compiled import CompileError
from ttcfast.models.vit import ViT, ViTConfig
from ttcfast.physics.solver import can_compile
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc.inference import TTCGreedy

SPEC = StateSpec.euler2d()
NOISES = {
    "dropout": {},
    "injected and latent": {"dropout_p": 0.2, "dropout_after": ("lift",), "latent_sigma": 0.1, "antithetic": True},
    "input": {"input_eps": 0.1},
}
needs_compiler = pytest.mark.skipif(not can_compile("cpu"), reason="no C++ compiler")


@pytest.fixture
def recordings(monkeypatch):
    """Graphs that were compiled, with a backend that runs them as they are."""
    graphs, compile = [], torch.compile

    def noted(graph, **options):
        graphs.append(graph)
        return compile(graph, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", noted)
    return graphs


def two_of(model: nn.Module, **options) -> tuple[Surrogate, Surrogate]:
    return tuple(Surrogate(model, SPEC, predicts="delta", compile=c, **options) for c in (False, True))  # type: ignore[return-value]


@pytest.mark.parametrize("noise", NOISES)
def test_another_step_seed_or_set_of_candidates_compiles_nothing_anew(noise, recordings):
    eager, compiled = two_of(DropNet(), stochastic=NOISES[noise])
    x = euler_state(2)
    torch.testing.assert_close(draw(compiled, x), draw(eager, x))
    for change in ({"step": 7}, {"seed": 2**40}, {"ids": torch.tensor([9, 2, 4, 8])}, {"problem_ids": torch.tensor([5, 2**31])}):
        out = draw(compiled, x, **change)
        torch.testing.assert_close(out, draw(eager, x, **change))
        assert not torch.equal(out, draw(compiled, x))
    assert len(recordings) == 1
    draw(compiled, euler_state(3))
    draw(compiled, x, stochastic={"dropout_p": 0.1})
    assert len(recordings) == 3


@pytest.mark.parametrize("noise", NOISES)
def test_the_deterministic_step_is_in_the_same_recording_as_the_candidates(noise, recordings):
    eager, compiled = two_of(DropNet(), stochastic=NOISES[noise])
    x = euler_state(2)
    for step in (1, 7):
        out = draw(compiled, x, step=step, include_deterministic=True)
        torch.testing.assert_close(out, torch.cat([eager.deterministic(x).unsqueeze(1), draw(eager, x, step=step)], 1))
    assert len(recordings) == 1


def test_the_deterministic_step_is_compiled_and_the_probes_are_not(recordings):
    eager, compiled = two_of(DropNet(), stochastic={"dropout": False, "latent_sigma": 1e-30})
    x = euler_state(2)
    torch.testing.assert_close(compiled.deterministic(x), eager.deterministic(x))
    assert len(recordings) == 1
    with pytest.raises(ValueError, match="16 probes are all the same"):
        draw(compiled, x, step=0)
    assert len(recordings) == 2


def test_low_precision_is_recorded_with_its_casts(recordings):
    eager, compiled = two_of(DropNet(), dtype=torch.bfloat16)
    x = euler_state(2)
    torch.testing.assert_close(draw(compiled, x), draw(eager, x))
    convolutions = [n for g in recordings for n in g.graph.nodes if n.target is torch.ops.aten.convolution.default]
    dtypes = [n.meta["tensor_meta"].dtype for n in convolutions]  # of the candidates, the deterministic step, and that in low precision
    low, full = torch.bfloat16, torch.float32
    assert dtypes == [low, full, full, full, low, full]
    with torch.no_grad():
        compiled.model.lift.weight.mul_(2)
    torch.testing.assert_close(draw(compiled, x), draw(eager, x))
    assert len(recordings) == 3 and not torch.is_autocast_enabled("cpu")


def test_weights_are_followed(recordings):
    model = DropNet()
    eager, compiled = two_of(model)
    x = euler_state(2)
    first = draw(compiled, x)
    with torch.no_grad():
        model.head.weight.mul_(2)
        model.norm.running_mean.add_(1)
    torch.testing.assert_close(draw(compiled, x), draw(eager, x))
    assert not torch.equal(draw(compiled, x), first) and len(recordings) == 1
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True)  # other tensors in their place
    torch.testing.assert_close(draw(compiled, x), draw(eager, x))
    model.double()
    torch.testing.assert_close(draw(compiled, x), draw(eager, x))
    assert len(recordings) == 3


def test_a_rollout_needs_two_compilations_whatever_happens_on_the_way(recordings):
    class Fails(DropNet):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1, :1, :1] > 5, torch.nan, super().forward(x))

    x0, results = euler_state(3), []
    x0[0] = 10.0
    for fm in two_of(Fails()):
        with pytest.warns(RuntimeWarning, match="no finite next state"):
            results.append(TTCGreedy(fm, lambda x, c: c[:, 0, 0, 0], TTCConfig(branching_factor=4)).rollout(x0, 3, return_info=True))
    assert len(recordings) == 2 and torch.equal(results[0].chosen, results[1].chosen) and results[0].nfe == results[1].nfe
    torch.testing.assert_close(results[0].trajectory, results[1].trajectory, equal_nan=True)


def test_what_cannot_be_compiled_is_said(monkeypatch):
    class Branches(DropNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.amax() < 100 else x

    with pytest.raises(
        CompileError, match=r"Branches cannot be compiled: .*; use compile=False, or a model whose path does not depend on values"
    ):
        draw(Surrogate(Branches(), SPEC, compile=True), euler_state(2))
    with pytest.raises(ValueError, match=r"this ViT takes \[N, 4, 8, 8\]"):  # the model's own complaint stays as it is
        draw(Surrogate(ViT(ViTConfig(grid=(8, 8), width=16, heads=2)), SPEC, compile=True), euler_state(2, 12))
    with pytest.raises(
        ValueError, match="compile is 'reduce-overhead'; it must be one of False, True, 'default', 'max-autotune-no-cudagraphs'"
    ):
        Surrogate(DropNet(), SPEC, compile="reduce-overhead")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda graph, **options: compile(graph, **options, backend=_no_compiler))
    with pytest.raises(CompileError, match="DropNet cannot be compiled: BackendCompilerFailed"):
        draw(Surrogate(DropNet(), SPEC, compile=True), euler_state(2))


def _no_compiler(graph, inputs):
    raise RuntimeError("no compiler here")


@needs_compiler
def test_inductors_candidates_are_the_eager_ones():
    eager, compiled = two_of(DropNet())
    x = euler_state(2)
    for options in ({"step": 0}, {"step": 1}, {"step": 1, "include_deterministic": True}):
        torch.testing.assert_close(draw(compiled, x, **options), draw(eager, x, **options))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_compiled_transformer(dtype):
    torch.manual_seed(0)
    model = ViT(ViTConfig(grid=(8, 8), patch=4, width=16, depth=2, heads=2, refine=4, dropout=0.2))
    nn.init.normal_(model.out.weight, std=0.05)
    eager, compiled = two_of(model, dtype=dtype)
    x = euler_state(2)
    difference = (draw(compiled, x) - draw(eager, x)).abs().max()
    assert difference <= {None: 1e-5, torch.bfloat16: 0.03}[dtype] * (draw(eager, x) - eager.deterministic(x).unsqueeze(1)).abs().max()
