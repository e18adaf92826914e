"""Linear layers by oneDNN: the same numbers, only where they apply, and nothing left behind."""

import pytest
import torch
from torch import Tensor, nn

from tests.surrogates import euler_state
from ttcfast.core import onednn
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.low_precision import LowPrecision
from ttcfast.core.onednn import onednn_products
from ttcfast.models.vit import ViT, ViTConfig
from ttcfast.spec import StateSpec

needs_onednn = pytest.mark.skipif(onednn._product is None or not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def products(monkeypatch):
    """Activations of the products that oneDNN was given."""
    found, own = [], onednn._product

    def noted(x, weight, bias, attribute, scalars, algorithm):
        found.append(f"{attribute} {algorithm}".strip())
        return own(x, weight, bias, attribute, scalars, algorithm)

    monkeypatch.setattr(onednn, "_product", noted)
    return found


def mlp(approximate: str = "tanh", bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=bias), nn.GELU(approximate=approximate), nn.Linear(40, 7))


def called(model: nn.Module, x: Tensor) -> Tensor:
    with onednn_products(model, x):
        return model(x)


@needs_onednn
@pytest.mark.parametrize("approximate, bias", [("tanh", True), ("none", False)])
@torch.no_grad()
def test_a_sequence_has_the_same_result_with_its_gelu_in_the_product(approximate, bias, products):
    model, x = mlp(approximate, bias), torch.randn(5, 3, 24)
    expected = model.double()(x.double()).float()
    torch.testing.assert_close(called(model.float(), x), expected, rtol=1e-5, atol=1e-6)
    assert products == [f"gelu {approximate}", "none"]
    torch.testing.assert_close(called(model, x.transpose(0, 1)), expected.transpose(0, 1), rtol=1e-5, atol=1e-6)  # strided


@needs_onednn
@torch.no_grad()
def test_who_looks_between_a_layer_and_its_gelu_sees_what_is_there(products):
    model, x, seen = mlp(), torch.randn(5, 24), []
    expected = model[0](x)
    with model[0].register_forward_hook(lambda module, inputs, output: seen.append(output)):
        called(model, x)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)
    assert products == ["none", "none"]


@needs_onednn
@torch.no_grad()
def test_layers_in_bfloat16_too_where_there_are_instructions_for_it(products):
    model, x = mlp(), torch.randn(5, 3, 24)
    low = LowPrecision(nn.Sequential(model, nn.Linear(7, 3)), torch.bfloat16)
    with low.products(x.device):
        out = called(low.current[0], x)
    torch.testing.assert_close(out, model(x), rtol=0.02, atol=0.02)
    assert out.dtype == torch.float32 and products == (["gelu tanh", "none"] if onednn._bfloat16() else [])


@pytest.mark.parametrize("case", ["gradient", "float64", "autocast", "own class", "own forward", "compiled"])
def test_other_calls_are_torchs_own(case, products):
    class Own(nn.Linear):
        pass

    model: nn.Module = nn.Sequential(Own(24, 40)) if case == "own class" else mlp()
    x = torch.randn(5, 24)
    if case == "float64":
        model, x = model.double(), x.double()
    if case == "own forward":
        for layer in (model[0], model[2]):
            layer.forward = lambda x, layer=layer: nn.functional.linear(x, layer.weight)
    if case == "compiled":
        model[0].compile(backend="eager")
    with torch.autocast("cpu", enabled=case == "autocast"), torch.set_grad_enabled(case == "gradient"):
        expected = model(x)
        assert torch.equal(called(model, x), expected) and not products
    if case == "gradient":
        expected.sum().backward()
        assert model[0].weight.grad is not None


@torch.no_grad()
def test_nothing_is_left_behind():
    model, x = mlp(), torch.randn(5, 23)
    with pytest.raises(RuntimeError):
        called(model, x)
    assert not any("forward" in vars(module) for module in model.modules())
    assert called(nn.Sequential(), x) is x and called(mlp(), torch.randn(0, 24)).shape == (0, 7)


@needs_onednn
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_surrogate_multiplies_so_and_its_model_does_not(dtype, products):
    torch.manual_seed(0)
    model = ViT(ViTConfig(grid=(8, 8), width=16, depth=2, heads=2, refine=4))
    nn.init.normal_(model.out.weight, std=0.1)
    fm, x = Surrogate(model, StateSpec.euler2d(), predicts="delta", dtype=dtype), euler_state(2, 8)
    with torch.no_grad():
        expected = x + model(x)
    assert not products
    torch.testing.assert_close(fm.deterministic(x), expected, rtol=1e-5, atol=1e-5)
    assert products == ["none", "none", "gelu tanh", "none"] * 2 + ["none"]
    fm.candidates(x, torch.arange(1, 4), seed=0, step=1)
    # in bfloat16 the candidates and the step that corrects them; without instructions for it their last product alone, in float32
    assert len(products) == (18 if dtype is None else 27 if onednn._bfloat16() else 11)
