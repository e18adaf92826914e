"""The ViT surrogate: what it commutes with, what it refuses, and that a checkpoint brings back the same model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ttcfast.core.normalizer import Normalizer
from ttcfast.models import ViT, ViTConfig, load_surrogate, save_surrogate
from ttcfast.models.checkpoint import surrogate_meta
from ttcfast.models.periodic import pad_grid
from ttcfast.models.vit import Attention, rotary_angles
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import CheckpointError
from ttcfast.spec import StateSpec

TINY = ViTConfig(grid=(16, 16), width=16, depth=2, heads=2, refine=4, dropout=0.1)


def tiny(config: ViTConfig = TINY, seed: int = 0) -> ViT:
    torch.manual_seed(seed)
    model = ViT(config).eval()
    torch.nn.init.normal_(model.out.weight, std=0.1)  # training starts from zero, which would hide every difference
    return model


@torch.no_grad()
def test_a_periodic_model_commutes_with_shifts_by_whole_patches():
    model, x = tiny(), torch.randn(2, 4, 16, 16)
    shift = (4, -8)
    assert torch.allclose(model(x.roll(shift, (2, 3))), model(x).roll(shift, (2, 3)), atol=1e-5)
    assert not torch.allclose(model(x.roll(1, 2)), model(x), atol=1e-3)


@torch.no_grad()
def test_a_bounded_model_sees_where_its_walls_are():
    model, x = tiny(ViTConfig(**{**TINY.to_dict(), "periodic": (False, True)})), torch.randn(1, 4, 16, 16)
    assert torch.allclose(model(x.roll(4, 3)), model(x).roll(4, 3), atol=1e-5)
    assert not torch.allclose(model(x.roll(4, 2)), model(x).roll(4, 2), atol=1e-3)


@torch.no_grad()
def test_attention_turns_queries_and_keys_by_the_angle_of_their_place():
    """Half-head pairs (a, b) are complex numbers a + ib, times exp(i angle); softmax(q k / sqrt(d)) v by its definition."""
    torch.manual_seed(0)
    layer, z = Attention(16, 2, (3, 4), (True, False)).double(), torch.randn(2, 3, 4, 16, dtype=torch.float64)
    q, k, v = layer.qkv(z).reshape(2, 12, 3, 2, 8).permute(2, 0, 3, 1, 4)
    turn = torch.polar(torch.tensor(1.0), rotary_angles((3, 4), (True, False), 8)).to(torch.complex128)
    q, k = (torch.complex(t[..., :4], t[..., 4:]) * turn for t in (q, k))
    weights = (torch.einsum("nhid,nhjd->nhij", q, k.conj()).real / 8**0.5).softmax(-1)
    mixed = torch.einsum("nhij,nhjd->nihd", weights, v).reshape(2, 3, 4, 16)
    torch.testing.assert_close(layer(z), layer.project(mixed), rtol=1e-5, atol=1e-6)  # the angles are float32


@torch.no_grad()
def test_the_untrained_model_predicts_no_change():
    assert torch.equal(ViT(TINY).eval()(torch.randn(2, 4, 16, 16)), torch.zeros(2, 4, 16, 16))


def test_dropout_acts_in_training_and_gradients_reach_every_weight():
    model, x = tiny().train(), torch.randn(2, 4, 16, 16)
    a, b = model(x), model(x)
    assert not torch.equal(a, b)
    a.square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) and float(p.grad.abs().sum()) > 0 for p in model.parameters())


def test_padding_wraps_or_repeats():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    padded = pad_grid(x, 1, (True, False))
    assert padded.shape == (1, 1, 6, 6)
    assert torch.equal(padded[0, 0, 0, 1:-1], x[0, 0, -1]) and torch.equal(padded[0, 0, 1:-1, 0], x[0, 0, :, 0])


@pytest.mark.parametrize("periodic", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("margin", [1, 2])
def test_large_grids_are_padded_in_one_pass(periodic, margin, monkeypatch):
    x = torch.randn(2, 3, 7, 5)
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        expected = pad_grid(laid, margin, periodic)
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr("ttcfast.models.periodic.LARGE", 0)
            patch.setattr(torch, "cat", None)  # not in two
            padded = pad_grid(laid, margin, periodic)
        assert torch.equal(padded, expected)
        assert padded.is_contiguous(memory_format=torch.contiguous_format if laid is x else torch.channels_last)


def test_grids_narrower_than_the_margin_and_batches_of_vmap_are_not_padded_in_one_pass(monkeypatch):
    monkeypatch.setattr("ttcfast.models.periodic.LARGE", 0)
    x = torch.randn(2, 1, 3, 6, 5)
    with torch.no_grad():
        each = torch.stack([pad_grid(part, 1, (True, False)) for part in x])
        assert torch.equal(torch.vmap(lambda part: pad_grid(part, 1, (True, False)))(x), each)
        narrow = pad_grid(x[0, :, :, :1], 2, (False, True))  # an edge may be repeated any number of times
        assert torch.equal(narrow[:, :, :, 2:-2], x[0, :, :, :1].expand(-1, -1, 5, -1))
        with pytest.raises(RuntimeError):
            pad_grid(x[0, :, :, :1], 2, (True, True))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"grid": (18, 16)}, "patch must divide"),
        ({"heads": 3}, "heads must divide"),
        ({"width": 6}, "even"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_wrong_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{**TINY.to_dict(), **change})


def test_a_wrong_grid_is_named():
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 8, 8\)"):
        tiny()(torch.zeros(1, 4, 8, 8))


def saved(tmp_path, **changes):
    normalizer = Normalizer(torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([0.5, 0.4, 0.4, 1.0]), torch.tensor([0.1, 0.1, 0.1, 0.2]))
    model = tiny()
    path = tmp_path / "m.safetensors"
    meta = {**surrogate_meta(model, normalizer, StateSpec.euler2d(cell_volume=1 / 256)), **changes}
    save_surrogate(path, model, meta)
    return path, model, normalizer


def test_a_checkpoint_brings_back_the_same_surrogate(tmp_path):
    path, model, normalizer = saved(tmp_path)
    surrogate = load_surrogate(path)
    x = torch.rand(2, 4, 16, 16) + 1
    with torch.no_grad():
        expected = x + normalizer.decode_delta(model(normalizer.encode(x)))
    torch.testing.assert_close(surrogate.deterministic(x), expected)  # its products are those of oneDNN
    assert surrogate.spec.cell_volume == 1 / 256 and surrogate.spec.momentum == (1, 2) and not surrogate.training
    candidates = surrogate.candidates(x, torch.arange(3), seed=0, step=0)
    assert candidates.shape == (2, 3, 4, 16, 16) and not torch.equal(candidates[:, 0], candidates[:, 1])
    latent = surrogate.candidates(x, torch.arange(2), seed=0, step=0, stochastic={"dropout": False, "latent_sigma": 0.1})
    assert not torch.equal(latent[:, 0], latent[:, 1])


def test_another_architecture_is_refused(tmp_path):
    path, _, _ = saved(tmp_path, architecture="unet")
    with pytest.raises(CheckpointError, match="architecture 'unet'; this version knows vit"):
        load_surrogate(path)
    path, _, _ = saved(tmp_path, model={**TINY.to_dict(), "width": 32})
    with pytest.raises(CheckpointError, match="another architecture"):
        load_surrogate(path)
    path, _, _ = saved(tmp_path, model={"size": 3})
    with pytest.raises(CheckpointError, match="cannot build"):
        load_surrogate(path)


def test_a_missing_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_surrogate(tmp_path / "no.safetensors")
    path, _, _ = saved(tmp_path)
    data = bytearray(path.read_bytes())
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    data[-3] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(data)
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for name in ("cut", "flipped", "foreign"):
        with pytest.raises(CheckpointError, match=name):
            load_surrogate(tmp_path / f"{name}.safetensors")


def test_a_state_dict_says_nothing_of_its_training(tmp_path):
    path, _, _ = saved(tmp_path)
    tensors, meta = checkpoints.load(path)
    assert set(tensors) == set(tiny().state_dict()) and "training" not in meta
