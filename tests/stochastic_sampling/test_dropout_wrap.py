import pytest
import torch
from torch import Tensor, nn

from tests.dropouts import DropPath, switches_of
from ttcfast.stochastic_sampling import enable_mc_dropout, mc_dropout
from ttcfast.stochastic_sampling.dropout_wrap import active_rates


class Swinv2DropPath(DropPath):
    pass


class StochasticDepth(DropPath):
    """torchvision's: the rate is called ``p``."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        del self.drop_prob

    def forward(self, x: Tensor) -> Tensor:
        self.drop_prob = self.p
        out = super().forward(x)
        del self.drop_prob
        return out


class SkipSample(DropPath):
    """A drop path under a name of its own: recognised by its ``drop_prob``."""


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), *layers).eval()


def differs(model: nn.Module) -> bool:
    torch.manual_seed(1)
    x = torch.randn(16, 2, 4, 4)
    return not torch.equal(model(x), model(x))


KINDS = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
PATHS = [DropPath, Swinv2DropPath, StochasticDepth, SkipSample]


@pytest.mark.parametrize("kind", KINDS + PATHS)
def test_every_kind_of_dropout_is_switched_on_and_nothing_else(kind):
    reshape = {nn.Dropout1d: nn.Flatten(2), nn.Dropout3d: nn.Unflatten(1, (2, 3))}.get(kind, nn.Identity())
    model = net(reshape, kind(0.4))
    before = model[1].running_mean.clone()
    assert not differs(model)
    assert enable_mc_dropout(model) is model
    assert differs(model)
    assert [m.training for m in model.modules() if not isinstance(m, kind)] == [False] * (len(list(model.modules())) - 1)
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("kind", [nn.Dropout, Swinv2DropPath, StochasticDepth])
def test_rates_are_set_where_the_model_ships_with_zero(kind):
    model = net(kind(0.0), nn.Identity())
    with pytest.raises(ValueError, match="stays deterministic: it has 1 dropout modules, none with a rate above 0"):
        enable_mc_dropout(model)
    enable_mc_dropout(model, p=0.5)
    assert differs(model)
    assert type(model[-1]) is nn.Identity


def test_the_distribution_is_that_of_dropout():
    model = nn.Sequential(nn.Dropout(0.25)).eval()
    enable_mc_dropout(model)
    torch.manual_seed(0)
    out = model(torch.ones(100_000))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)


def test_dropout_is_injected_behind_named_modules():
    model = net(nn.ReLU())
    enable_mc_dropout(model, p=0.5, after=["0"])
    assert differs(model)
    enable_mc_dropout(model, p=0.1, after=["0"])  # a second call sets the rate anew
    assert len(model[0]._forward_hooks) == 1


def test_injection_reaches_the_first_entry_of_a_tuple():
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x, "kept"

    model = nn.Sequential(Two()).eval()
    enable_mc_dropout(model, p=0.5, after=["0"])
    out, kept = model(torch.ones(1000))
    assert kept == "kept" and 300 < int((out == 0).sum()) < 700


def test_the_context_restores_everything_exactly():
    model = net(nn.Dropout(0.0), DropPath(0.2), nn.Identity())
    model[2].train()  # a state that is neither all on nor all off
    enable_mc_dropout(model, p=0.3, after=["4"])
    before = switches_of(model)
    with pytest.raises(RuntimeError, match="stop"), mc_dropout(model, 0.7, after=["0", "4"]):
        assert differs(model)
        assert model[2].p == 0.7 and model[3].drop_prob == 0.7 and len(model[0]._forward_hooks) == 1
        raise RuntimeError("stop")
    assert switches_of(model) == before
    assert next(iter(model[4]._forward_hooks.values())).p == 0.3


def test_wrong_arguments_say_what_to_do():
    model = net(nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"p is 1.5; a dropout rate lies in \[0, 1\)"):
        enable_mc_dropout(model, p=1.5)
    with pytest.raises(ValueError, match="after names \\['nope'\\], which Sequential does not have; it has '0', '1', '2'"):
        enable_mc_dropout(model, p=0.1, after=["nope"])
    with pytest.raises(ValueError, match="injected dropout needs a rate"):
        enable_mc_dropout(model, after=["0"])
    with pytest.raises(ValueError, match="give a list of module names"):
        enable_mc_dropout(model, p=0.1, after="0")
    with pytest.raises(ValueError, match="Linear stays deterministic: it has 0 dropout modules"):
        enable_mc_dropout(nn.Linear(2, 2))


def test_rates_are_logged(caplog):
    with caplog.at_level("INFO", logger="ttcfast"):
        enable_mc_dropout(net(nn.Dropout(0.1)))
    assert "1 active sites, rates [0.1]" in caplog.text


def encoder(dropout: float) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("own, p", [(0.3, None), (0.0, 0.3)])
def test_dropout_reaches_transformer_layers_past_the_fused_path(own, p):
    model, x = encoder(own), torch.randn(4, 5, 8)
    fused, before = torch.backends.mha.get_fastpath_enabled(), switches_of(model)
    with torch.no_grad():
        clean = model(x)
        with mc_dropout(model, p):
            assert not torch.backends.mha.get_fastpath_enabled()
            assert len(active_rates(model)) == 8 and not torch.equal(model(x), model(x))
            assert [type(m).__name__ for m in model.modules() if m.training] == ["MultiheadAttention", *["Dropout"] * 3] * 2
        assert torch.equal(model(x), clean)
    assert torch.backends.mha.get_fastpath_enabled() == fused and switches_of(model) == before


@pytest.mark.parametrize("own, p", [(0.5, None), (0.0, 0.5)])
def test_attention_drops_its_weights(own, p):
    model, x = nn.MultiheadAttention(8, 2, dropout=own, batch_first=True).eval(), torch.randn(4, 5, 8)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="stop"), mc_dropout(model, p):
            assert active_rates(model) == [0.5] and model.dropout == 0.5
            assert not torch.equal(model(x, x, x)[0], model(x, x, x)[0])
            raise RuntimeError("stop")
        assert torch.equal(model(x, x, x)[0], model(x, x, x)[0])
    assert model.dropout == own and not model.training and torch.backends.mha.get_fastpath_enabled()


def test_enabling_for_good_reaches_transformer_layers_too():
    model, x = encoder(0.3), torch.randn(4, 5, 8)
    try:
        enable_mc_dropout(model)
        with torch.no_grad():
            assert not torch.equal(model(x), model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
