import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.surrogates import DropNet, draw, drop_surrogate, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.low_precision import DTYPES, LowPrecision
from ttcfast.core.onednn import onednn_products
from ttcfast.models.vit import ViT, ViTConfig
from ttcfast.spec import StateSpec
from ttcfast.stochastic_sampling import enable_mc_dropout

SPEC = StateSpec.euler2d()


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = ViT(ViTConfig(grid=(8, 8), patch=4, width=16, depth=2, heads=2, refine=4, dropout=0.2)).eval()
    nn.init.normal_(model.out.weight, std=0.1)
    return model


def products_of(model: nn.Module, x: Tensor) -> dict[str, tuple[torch.dtype, ...]]:
    """Dtypes of weights, and of what comes out of each module behind its own hooks."""
    seen: dict[str, tuple[torch.dtype, ...]] = {}

    def note(name):
        return lambda module, inputs, output: seen.setdefault(name, (next(module.parameters()).dtype, output.dtype)) and None

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if list(m.parameters()) and n]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_products_are_low_and_sums_norms_and_the_result_are_not(dtype):
    model, x = vit(), torch.randn(2, 4, 8, 8)
    low = LowPrecision(model, dtype)
    with low.products(x.device):
        seen = products_of(low.current, x)
        out = low.current(x)
    assert not torch.is_autocast_enabled("cpu")
    for name in ("embed", "blocks.0.attention.project", "blocks.1.mlp.2", "mix"):
        assert seen[name] == (dtype, torch.float32), name
    for name in ("blocks.1.attention.qkv", "blocks.0.mlp.0"):  # narrowed again by what follows
        assert seen[name] == (dtype, dtype), name
    for name in ("blocks.0.local", "unpatch"):  # a depthwise convolution, and what the model says
        assert seen[name] == (torch.float32, torch.float32), name
    for name in ("blocks.0", "blocks.0.norm1", "norm", "out"):
        assert seen[name][1] == torch.float32, name
    assert seen["out"][0] == torch.float32 and out.dtype == torch.float32
    error = (out - model(x)).abs().max() / model(x).abs().max()
    assert 1e-6 < error < {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_model_may_say_what_stays_in_full_precision():
    model, x = vit(), torch.randn(2, 4, 8, 8)
    model.full_precision = ("unpatch", "mix")
    low = LowPrecision(model, torch.bfloat16)
    with low.products(x.device), torch.no_grad():
        seen = products_of(low.current, x)
    assert [seen[n][0] == torch.float32 for n in ("unpatch", "mix", "out", "embed")] == [True, True, False, False]
    for wrong in ("out", ("norm",)):
        model.full_precision = wrong
        with pytest.raises(ValueError, match=r"ViT.full_precision is .*; give a tuple of names of linear layers or convolutions, such as"):
            Surrogate(model, SPEC, dtype=torch.bfloat16)


def test_a_module_names_layers_of_its_own_that_stay_low():
    model = vit()
    for wrong in (True, ("project", "qk")):
        model.blocks[0].attention.low_precision = wrong
        with pytest.raises(ValueError, match=r"Attention.low_precision is .*; give a tuple of names of its linear layers or convolutions"):
            LowPrecision(model, torch.bfloat16).current  # noqa: B018


@torch.no_grad()
def test_outputs_are_widened_to_the_dtype_of_the_first_parameter():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last, self.unused = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Embedding(3, 4).double()

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    model, x = Named(), torch.randn(5, 4)
    low, expected = LowPrecision(model, torch.bfloat16), model(x)
    with low.products(x.device):
        torch.testing.assert_close(low.current(x), expected, rtol=0, atol=0.1)


@torch.no_grad()
def test_an_activation_between_two_layers_rounds_once_as_narrowing_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 8), nn.Linear(8, 4))
    x = torch.randn(5, 24)
    low = LowPrecision(model, torch.bfloat16)
    with low.products(x.device):
        seen, out = products_of(low.current, x), low.current(x)
        with onednn_products(low.current, x):
            fused = low.current(x)
    assert [seen[n][1] for n in "0245"] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    h = x.bfloat16()
    for i, after in ((0, nn.functional.gelu), (2, torch.tanh), (4, lambda h: h)):
        h = after(nn.functional.linear(h, model[i].weight.bfloat16(), model[i].bias.bfloat16()).float()).bfloat16()
    assert torch.equal(out, model[5](h.float()))
    torch.testing.assert_close(fused, out, rtol=0, atol=0.01)  # the GELU sees the sum before it is rounded


@torch.no_grad()
def test_an_error_within_leaves_autocast_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_forward_hook(lambda *_: 1 / 0)
    low = LowPrecision(model, torch.bfloat16)
    with pytest.raises(ZeroDivisionError), low.products(torch.device("cpu")):
        low.current(torch.randn(2, 4))
    assert not torch.is_autocast_enabled("cpu")


@torch.no_grad()
def test_attention_normalisation_and_complex_weights_need_no_care():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.norm = nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.spectrum = nn.Parameter(torch.randn(8, dtype=torch.complex64))
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm(self.lift(x.flatten(2))).transpose(1, 2)
            z = z + self.attention(z, z, z, need_weights=False)[0]
            z = z + torch.fft.irfft(torch.fft.rfft(z, dim=1) * self.spectrum, n=z.shape[1], dim=1)
            return self.head(z).transpose(1, 2).reshape(x.shape)

    torch.manual_seed(0)
    model, x = Mixed().eval(), euler_state(2)
    low = LowPrecision(model, torch.bfloat16)
    with low.products(x.device):
        out = low.current(x)
    assert 0 < (out - model(x)).abs().max() < 0.03 * model(x).abs().max()


def test_candidates_are_low_and_the_step_they_are_corrected_by_is_not():
    fm = Surrogate(vit(), SPEC, predicts="delta")
    cheap, x = fm.variant(dtype=torch.bfloat16), euler_state(3)
    assert torch.equal(cheap.deterministic(x), fm.deterministic(x))
    ours, theirs = draw(fm, x), draw(cheap, x)
    assert theirs.dtype == torch.float32
    error, spread = (theirs - ours).abs().max(), (ours - fm.deterministic(x).unsqueeze(1)).abs().max()
    assert 0 < error < 0.03 * spread
    # without noise nothing is left of the error that all candidates have in common
    still = draw(cheap, x, stochastic={"dropout": False, "latent_sigma": 1e-30})
    torch.testing.assert_close(still, fm.deterministic(x).unsqueeze(1).expand_as(still), rtol=0, atol=2e-6)


def test_the_deterministic_step_is_computed_once_for_the_same_states_and_weights():
    cheap = drop_surrogate(dtype=torch.bfloat16)
    fm = Surrogate(cheap.model, SPEC, predicts="delta")
    calls, x = cheap.model.calls, euler_state(3)  # the copy has a list of its own
    calls.clear()
    cheap.deterministic(x)
    draw(cheap, x)
    cheap.deterministic(x).zero_()  # what is handed out is the caller's
    assert torch.equal(cheap.deterministic(x), fm.deterministic(x))
    draw(cheap, x.clone())
    assert calls == [3, 3]  # once more for fm
    draw(cheap, 2 * x)
    cheap.deterministic(2 * x[:1])
    assert calls == [3, 3, 3, 1]
    with torch.no_grad():
        cheap.model.head.weight.mul_(2)
    draw(cheap, 2 * x[:1])
    assert calls == [3, 3, 3, 1, 1]


def test_the_copy_follows_weights_rates_and_devices():
    fm = drop_surrogate(scale=1.0)
    cheap, x = fm.variant(dtype=torch.bfloat16), euler_state(2)

    def agree() -> bool:
        scale = (draw(fm, x) - fm.deterministic(x).unsqueeze(1)).abs().max()
        return bool((draw(cheap, x) - draw(fm, x)).abs().max() < 0.03 * scale)

    assert agree()
    with torch.no_grad():
        fm.model.head.weight.mul_(3)
        fm.model.norm.running_var.mul_(4)
    assert agree()
    enable_mc_dropout(fm.model, p=0.6, after=["lift"])
    assert agree()
    fm.model.load_state_dict({k: 0.5 * v for k, v in fm.model.state_dict().items()}, assign=True)
    assert agree()
    fm.model.norm = torch.nn.GroupNorm(2, 8)  # no buffers are left that would be replaced
    assert agree()
    fm.model.double()
    assert agree() and draw(cheap, x.double()).dtype == torch.float64
    for other in (copy.deepcopy(cheap), pickle.loads(pickle.dumps(cheap))):
        assert torch.equal(draw(other, x), draw(cheap, x))


def test_a_step_that_blows_up_takes_no_candidate_with_it():
    class Brittle(DropNet):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return torch.where(out[:, :1, :1, :1] == self.worst, torch.nan, out) if self.worst is not None else out

    model = Brittle(4, 4).eval()
    model.worst = None
    x = euler_state(1)
    model.worst = model(x)[0, 0, 0, 0].item()  # the deterministic step fails
    fm = Surrogate(model, SPEC, predicts="delta")
    assert fm.deterministic(x).isnan().any() and draw(fm.variant(dtype=torch.bfloat16), x).isfinite().all()


def test_other_dtypes_are_refused():
    for wrong in (torch.float32, torch.int32, "bfloat16"):
        with pytest.raises(ValueError, match=r"dtype is .*; it must be one of torch.bfloat16, torch.float16"):
            Surrogate(DropNet(), SPEC, dtype=wrong)
