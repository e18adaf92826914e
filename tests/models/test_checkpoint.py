"""A checkpoint keeps the layout it was trained with, symmetries included."""

from pathlib import Path

import pytest
import torch

from ttcfast.core.normalizer import Normalizer
from ttcfast.data import open_trajectories
from ttcfast.models import ViT, ViTConfig, load_surrogate, save_surrogate
from ttcfast.models.checkpoint import surrogate_meta
from ttcfast.spec import StateSpec
from ttcfast.states.symmetry import Symmetry

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DECLARED = {"symmetries": [Symmetry(flips=(True, False), shifts=(0, 4), odd=("w",))], "translations": (0,)}


@pytest.mark.parametrize("declared", [DECLARED, {}])
def test_declared_symmetries_survive_and_their_absence_loads(tmp_path, declared):
    spec = StateSpec.fields("w", **declared)
    model = ViT(ViTConfig(grid=(8, 8), channels=1, width=8, depth=1, heads=1))
    one = torch.ones(1)
    save_surrogate(tmp_path / "a.safetensors", model, surrogate_meta(model, Normalizer(0 * one, one, one), spec))
    found = load_surrogate(tmp_path / "a.safetensors").spec
    assert (found.symmetries, found.translations) == (spec.symmetries, spec.translations)
    assert len(found.symmetries) == len(declared.get("symmetries", ()))


def test_the_shipped_kolmogorov_surrogate_declares_what_its_data_do():
    model, data = load_surrogate(EXAMPLES / "kolmogorov" / "surrogate.safetensors"), open_trajectories(EXAMPLES / "kolmogorov")
    assert model.spec.symmetries == data.spec.symmetries != () and model.spec.translations == data.spec.translations == (0,)
    x = data.stack()[:1, 0]
    drawn = model.candidates(x, torch.arange(3), seed=0, step=0, stochastic={"dropout": False, "symmetry": True})
    torch.testing.assert_close(drawn[:, 0], model.deterministic(x))
    assert float((drawn[:, 1:] - drawn[:, :1]).abs().amax((2, 3, 4)).max()) > 1e-3
