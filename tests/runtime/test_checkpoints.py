import json
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ttcfast.runtime.checkpoints import load, load_training, load_weights, save, save_training
from ttcfast.runtime.errors import CheckpointError, OutputError

META = {"architecture": "vit", "sizes": {"width": 8, "patch": [4, 4]}, "mean": [0.1, 1e-30], "worst": float("inf")}


def tensors():
    shared = torch.randn(4, 4)
    return {
        "float": shared,
        "tied": shared,
        "strided": shared.t(),
        "double": torch.randn(3, dtype=torch.float64),
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }


def test_a_checkpoint_comes_back_exactly(tmp_path):
    given = tensors()
    save(tmp_path / "a.safetensors", given, META)
    found, meta = load(tmp_path / "a.safetensors", expect={"architecture": "vit", "sizes": {"width": 8, "patch": (4, 4)}})
    assert meta == META
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path):
    given = tensors()
    save(tmp_path / "a", given, META)
    save(tmp_path / "b", given, META)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors does not exist; give the path"):
        load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped bit"])
def test_a_damaged_checkpoint_is_told(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    save(path, tensors(), META)
    whole = path.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:]
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"not a checkpoint at all", "flipped bit": flipped}[damage])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged"):
        load(path)


def test_a_checkpoint_of_another_program_is_told(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not written by ttcfast"):
        load(tmp_path / "a.safetensors")


def test_a_checkpoint_of_another_architecture_is_told(tmp_path):
    save(tmp_path / "a", tensors(), META)
    with pytest.raises(CheckpointError, match="has architecture 'vit'; expected 'unet': give a checkpoint of that architecture"):
        load(tmp_path / "a", expect={"architecture": "unet"})


def test_weights_of_other_shapes_or_names_are_told():
    with pytest.raises(CheckpointError, match=r"of another architecture: weight is \(3, 2\), the model's is \(4, 2\)"):
        load_weights(nn.Linear(2, 4), {"weight": torch.zeros(3, 2), "bias": torch.zeros(4)}, "a")
    with pytest.raises(CheckpointError, match="bias is missing; scale is not in the model"):
        load_weights(nn.Linear(2, 4), {"weight": torch.zeros(4, 2), "scale": torch.zeros(4)}, "a")


def test_an_unwritable_place_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        save(tmp_path / "file" / "a.safetensors", tensors(), META)
    assert os.listdir(tmp_path) == ["file"]


def training(seed: int):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.3), nn.BatchNorm1d(7), nn.Linear(7, 1))
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.01}, {"params": model[3].parameters()}], lr=0.02, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return model, optimizer, schedule


def steps(model, optimizer, schedule, n):
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        noise = random.random() + float(np.random.rand())  # noqa: NPY002  # the global generators are restored too
        loss = (model(torch.randn(6, 5)) - noise).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_a_resumed_training_is_bitwise_the_unbroken_one(tmp_path):
    model, optimizer, schedule = training(1)
    steps(model, optimizer, schedule, 4)
    extra = {"step": 4, "best": float("nan"), "schedule": schedule.state_dict(), "window": (1, 2.5), "ema": {"w": torch.randn(3)}}
    save_training(tmp_path / "a", model, optimizer, extra, meta={"architecture": "mlp"})
    unbroken = steps(model, optimizer, schedule, 5)

    model2, optimizer2, schedule2 = training(2)
    found = load_training(tmp_path / "a", model2, optimizer2, expect={"architecture": "mlp"})
    assert found["window"] == (1, 2.5) and found["step"] == 4 and np.isnan(found["best"])
    assert torch.equal(found["ema"]["w"], extra["ema"]["w"])
    schedule2.load_state_dict(found["schedule"])
    assert steps(model2, optimizer2, schedule2, 5) == unbroken
    for a, b in zip(model.state_dict().values(), model2.state_dict().values()):
        assert torch.equal(a, b)
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, optimizer2.state_dict()["state"][key][name]), name


def test_a_training_state_that_does_not_fit_is_told(tmp_path):
    model, optimizer, _ = training(1)
    save_training(tmp_path / "a", model, optimizer, {})
    with pytest.raises(CheckpointError, match="another optimizer's state"):
        load_training(tmp_path / "a", model, torch.optim.AdamW(model.parameters()))
    save(tmp_path / "weights", model.state_dict(), {})
    with pytest.raises(CheckpointError, match="weights alone, no training state"):
        load_training(tmp_path / "weights", model, optimizer)
    with pytest.raises(TypeError, match=r"extra\.f is a function"):
        save_training(tmp_path / "b", model, optimizer, {"f": json.dumps})


def test_entries_that_are_missing_or_of_another_type_are_one_error(tmp_path):
    from ttcfast.front_door import examples
    from ttcfast.models import load_surrogate

    held, meta = load(next(p for p in examples(None).glob("surrogate.safetensors")))
    path = tmp_path / "odd.safetensors"
    for entry in ("normalizer", "spec", "predicts"):
        save(path, held, {k: v for k, v in meta.items() if k != entry})
        with pytest.raises(CheckpointError, match=f"does not describe a surrogate: it has no '{entry}'"):
            load_surrogate(path)
        for wrong in (3, [], "x"):
            save(path, held, {**meta, entry: wrong})
            with pytest.raises(CheckpointError, match="does not describe a surrogate"):
                load_surrogate(path)
    for entry, wrong in (("architecture", [1]), ("model", 3), ("model", None)):
        save(path, held, {**meta, entry: wrong})
        with pytest.raises(CheckpointError):
            load_surrogate(path)


@pytest.mark.parametrize("skeleton", [3, {"dict": [["optimizer", 1]]}, {"tensor": "nowhere"}, {"dict": 3}, {}])
def test_a_hand_made_training_state_is_one_error(tmp_path, skeleton):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    weights = {f"model.{n}": t for n, t in model.state_dict().items()}
    save(tmp_path / "t.safetensors", weights, {"training": skeleton})
    with pytest.raises(CheckpointError, match="does not describe a training state"):
        load_training(tmp_path / "t.safetensors", model, optimizer)
