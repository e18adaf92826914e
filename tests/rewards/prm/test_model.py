"""The reward models: the sketch's definition, savings that change nothing, the grid's symmetries, files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.flips import unnoticed
from ttcfast.core.normalizer import Normalizer
from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.rewards.prm.model import PRM
from ttcfast.rewards.prm.network import PairNetwork
from ttcfast.rewards.prm.sizes import SIZES, make_prm
from ttcfast.rewards.prm.sketch_files import load_state_dict_file
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import CheckpointError
from ttcfast.spec import StateSpec

NORMALIZER = Normalizer(torch.tensor([1.0, 0.1, -0.2, 3.0]), torch.tensor([0.5, 0.4, 0.3, 2.0]), torch.tensor([0.05, 0.06, 0.07, 0.3]))


class SeedPRM(nn.Module):
    """The network of the TTC plan, "Process Reward Model (PRM)", as printed."""

    def __init__(self, in_ch, width=64, depth=6):
        super().__init__()
        layers, ch = [], in_ch
        for _ in range(depth):
            layers += [nn.Conv2d(ch, width, 3, padding=1), nn.GELU()]
            ch = width
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))

    def forward(self, state_t, cand_tp1):
        x = torch.cat([state_t, cand_tp1], dim=1)
        return self.head(self.trunk(x)).squeeze(-1)


def pairs(n=2, b=3, side=16):
    generator = torch.Generator().manual_seed(5)
    state = 1 + torch.rand(n, 4, side, side, generator=generator)
    return state, state.unsqueeze(1) + 0.05 * torch.randn(n, b, 4, side, side, generator=generator)


def trained_looking(network):
    """Random weights everywhere: a last layer of zeros would make every test of the field pass."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network.eval()


def networks():
    torch.manual_seed(7)
    spec = StateSpec.euler2d()
    return [
        trained_looking(PRM(8, 12, 3, normalizer=NORMALIZER, spec=spec)),
        trained_looking(DensePRM(8, 6, levels=3, normalizer=NORMALIZER, spec=spec)),
        trained_looking(DensePRM(8, (6, 8), (1, 2), levels=2, patch=2, normalizer=NORMALIZER, spec=spec)),
    ]


def test_with_zero_padding_and_no_normaliser_it_is_the_sketch(tmp_path):
    torch.manual_seed(0)
    seed = SeedPRM(8, 12, 3)
    torch.save(seed.state_dict(), tmp_path / "prm.pt")
    ours = load_state_dict_file(tmp_path / "prm.pt")
    state, candidates = pairs()
    for n in range(2):
        expected = seed(state[n].expand_as(candidates[n]), candidates[n])
        torch.testing.assert_close(ours(state[n].expand_as(candidates[n]), candidates[n]), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.score_group(state, candidates)[1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", networks(), ids=["scalar", "dense", "dense, patch 2"])
def test_a_group_scores_as_its_pairs_do(network):
    state, candidates = (x.double() for x in pairs())
    network = network.double()
    alone = torch.stack([network(state, candidates[:, b]) for b in range(3)], 1)
    torch.testing.assert_close(network.score_group(state, candidates), alone, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(network.score_group(state, candidates, network.state_share(state)), alone, rtol=1e-9, atol=1e-12)
    assert alone.std() > 1e-4
    network.float()


@pytest.mark.parametrize("network", networks(), ids=["scalar", "dense", "dense, patch 2"])
def test_periodic_shifts_do_not_change_a_score(network):
    state, candidates = pairs()
    shift = (getattr(network, "stride", 1), 2 * getattr(network, "stride", 1))
    moved = network.score_group(state.roll(shift, (-2, -1)), candidates.roll(shift, (-2, -1)))
    torch.testing.assert_close(moved, network.score_group(state, candidates), rtol=1e-4, atol=1e-6)


def test_walls_and_zeros_change_what_is_seen_at_the_edge():
    state, candidates = pairs()
    torch.manual_seed(0)
    wrapped = PRM(8, 6, 2, normalizer=NORMALIZER)
    for other in (PRM(8, 6, 2, normalizer=NORMALIZER, periodic=(False, True)), PRM(8, 6, 2, normalizer=NORMALIZER, padding="zeros")):
        other.load_state_dict(wrapped.state_dict())
        assert not torch.allclose(other.score_group(state, candidates), wrapped.score_group(state, candidates), rtol=1e-4)


def test_the_dense_score_is_minus_the_mean_square_of_the_error_it_predicts():
    network = networks()[1]
    state, candidates = pairs()
    field = network.error(state, candidates[:, 0])
    assert field.shape == state.shape
    torch.testing.assert_close(network(state, candidates[:, 0]), -field.square().mean((1, 2, 3)))


def test_an_untrained_dense_model_finds_no_fault():
    state, candidates = pairs()
    assert DensePRM(8, 6, levels=2).score_group(state, candidates).abs().max() == 0


@pytest.mark.parametrize("network", networks(), ids=["scalar", "dense", "dense, patch 2"])
def test_saved_and_loaded_it_is_the_same(network, tmp_path):
    network.info = {"surrogate": "abc", "training": {"margin": 0.2}}
    network.save_pretrained(tmp_path / "prm")
    again = PRM.from_pretrained(tmp_path / "prm")
    state, candidates = pairs()
    assert type(again) is type(network) and again.info == network.info and again.spec.to_meta() == network.spec.to_meta()
    assert torch.equal(again.score_group(state, candidates), network.score_group(state, candidates))


def test_damaged_and_foreign_files_are_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        PairNetwork.from_pretrained(tmp_path)
    networks()[0].save_pretrained(tmp_path / "prm")
    text = (tmp_path / "prm" / "config.json").read_text()
    (tmp_path / "prm" / "config.json").write_text(text.replace('"scalar"', '"magic"'))
    with pytest.raises(CheckpointError, match="kind is 'magic'"):
        PairNetwork.from_pretrained(tmp_path / "prm")
    (tmp_path / "prm" / "config.json").write_text(text.replace('"width": 12', '"width": 13'))
    with pytest.raises(CheckpointError, match="width 12; expected 13"):
        PairNetwork.from_pretrained(tmp_path / "prm")
    for name, content in {"list": [torch.ones(2)], "number": {"trunk.0.weight": 3}, "code": {"f": torch.nn.Linear(1, 1)}}.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(CheckpointError, match="tensors"):
            load_state_dict_file(tmp_path / f"{name}.pt")
    torch.save({"layer.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no trunk"):
        load_state_dict_file(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        load_state_dict_file(tmp_path / "text.pt")


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="in_ch is 7"):
        PRM(7)
    with pytest.raises(ValueError, match="normalizer has 4 channels and in_ch is 10"):
        PRM(10, normalizer=NORMALIZER)
    with pytest.raises(ValueError, match=r"width is .* for 3 levels"):
        DensePRM(8, (4, 8), levels=3)
    with pytest.raises(ValueError, match=r"takes states \[N, 4, X, Y\]"):
        PRM(8, 4, 1).score_group(torch.rand(1, 5, 8, 8), torch.rand(1, 2, 5, 8, 8))
    with pytest.raises(ValueError, match="multiples of 8"):
        DensePRM(8, 4).score_group(torch.rand(1, 4, 12, 8), torch.rand(1, 2, 4, 12, 8))
    with pytest.raises(ValueError, match="a dense reward model has not"):
        make_prm("dense", 8, sizes={"heads": 3})


def test_named_sizes_are_the_surrogates_own_and_a_small_one():
    count = {kind: {name: sum(p.numel() for p in make_prm(kind, 8, name).parameters()) for name in SIZES[kind]} for kind in SIZES}
    assert all(abs(count[kind]["surrogate"] / 620_644 - 1) < 0.02 for kind in SIZES)
    assert count["scalar"]["seed"] == sum(p.numel() for p in SeedPRM(8).parameters())


def test_a_config_that_is_not_the_weights_own_is_refused(tmp_path, caplog):
    network = networks()[1]
    network.save_pretrained(tmp_path / "prm")
    place = tmp_path / "prm" / "config.json"

    def read():
        again = PairNetwork.from_pretrained(tmp_path / "prm")
        norm = again.normalizer
        told = () if norm is None else (norm.mean.tolist(), norm.std.tolist(), norm.delta_std.tolist())
        return again.config(), str(told), str(again.spec), str(again.info)

    assert unnoticed(place, read, 250) == []
    config = json.loads(place.read_text())
    config["normalizer"]["std"][0] *= 2
    place.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json is not the one that model\.safetensors was written with \(other normalizer\)"):
        read()
    assert not caplog.records


def test_a_folder_of_an_older_version_opens_and_says_that_it_has_none(caplog, tmp_path):
    shutil.copytree(Path(__file__).resolve().parents[3] / "examples" / "prm", tmp_path / "prm")
    tensors, meta = checkpoints.load(tmp_path / "prm" / "model.safetensors")
    checkpoints.save(tmp_path / "prm" / "model.safetensors", tensors, {name: value for name, value in meta.items() if name != "config"})
    with caplog.at_level("INFO"):
        PairNetwork.from_pretrained(tmp_path / "prm")
    assert [r.levelname for r in caplog.records] == ["INFO"] and "whose config.json has no checksum" in caplog.text
