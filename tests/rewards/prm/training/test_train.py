"""Training a reward model: it learns to rank, resumes exactly, shares batches between processes, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.killed import kill_at_update
from tests.surrogates import drop_surrogate, euler_state, shifted
from ttcfast.cli.main import main
from ttcfast.core.normalizer import Normalizer
from ttcfast.data.generate import GenerateConfig, generate
from ttcfast.models import load_surrogate
from ttcfast.models.train import TrainConfig, TrainingError
from ttcfast.models.train import train as train_surrogate
from ttcfast.rewards.common import PRMScorer
from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.rewards.prm.model import PRM
from ttcfast.rewards.prm.train import (
    DataOptions,
    LossOptions,
    ModelOptions,
    OptimOptions,
    SurrogateOptions,
    TrainPRMConfig,
    train,
    train_prm,
    triplet_margin_loss,
)
from ttcfast.rewards.prm.training.losses import RewardLoss
from ttcfast.rewards.prm.training.validation import Validation, ranking
from ttcfast.rewards.prm.triplets.batches import AugmentOptions, Batches, Triplets
from ttcfast.rewards.prm.triplets.build import build_triplets
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError, DataError
from ttcfast.spec import StateSpec

K = 9
DENSE = ModelOptions(kind="dense", width=(6, 8), depth=(1, 1), levels=2)


def build(out, **options):
    """Triplets of a surrogate with large dropout, whose truth is a shift by a cell: the error is there to be learned."""
    torch.manual_seed(1)
    norm = Normalizer(torch.tensor([1.1, 0.1, 0.1, 2.6]), torch.full((4,), 0.06), torch.full((4,), 0.08))
    surrogate = drop_surrogate(normalizer=norm, scale=0.5)
    return build_triplets(surrogate, shifted(euler_state(12), 3), out, **{"K": K, "T_prm": 3, **options})


@pytest.fixture(scope="module")
def triplets(tmp_path_factory):
    return build(tmp_path_factory.mktemp("triplets"))


@pytest.fixture
def config(triplets, tmp_path):
    return TrainPRMConfig(
        data=DataOptions(root=str(triplets), valid=0.25),
        model=DENSE,
        optim=OptimOptions(batch=4, steps=8, warmup=2, lr=3e-3),
        out=str(tmp_path / "run"),
        val_every=4,
        save_every=4,
        log_every=1,
    )


def weights(folder):
    return checkpoints.load(Path(folder) / "model.safetensors")[0]


def losses(folder):
    entries = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return {e["step"]: e["loss"] for e in entries if "loss" in e}


def test_the_margin_loss_is_the_plans():
    best, median, worst = torch.tensor([1.0, 0.3]), torch.tensor([0.9, 0.5]), torch.tensor([0.0, 0.45])
    assert float(triplet_margin_loss(best, median, worst)) == pytest.approx((0.1 + 0.4) / 2 + (0.0 + 0.15) / 2)
    for margin in (0.0, -1.0, float("inf"), float("nan"), "0.2", None):
        said = f"margin is {margin!r}; give a finite number above 0"
        with pytest.raises(ValueError, match=said):
            triplet_margin_loss(best, median, worst, margin)
        with pytest.raises(ValueError, match=said):
            LossOptions(margin=margin)


def test_a_scalar_model_learns_to_rank_held_out_triplets(config):
    plain = dataclasses.replace(
        config, model=ModelOptions(width=8, depth=2), optim=OptimOptions(batch=8, steps=100, lr=3e-2, warmup=5), val_every=100
    )
    result = train(dataclasses.replace(plain, augment=AugmentOptions(symmetry=False)))
    assert isinstance(result.prm, PRM)
    assert result.validation["triplet/pair_accuracy"] > 0.7
    assert result.prm.info["surrogate"] == Triplets(config.data.root).surrogate


def test_a_dense_model_learns_the_way_to_the_truth(config):
    longer = OptimOptions(batch=8, steps=150, lr=1e-2, warmup=5)
    result = train(dataclasses.replace(config, optim=longer, val_every=50, loss=LossOptions(field="mse")))
    assert isinstance(result.prm, DensePRM)
    assert result.validation["error_left"] < 0.6
    assert result.validation["triplet/pair_accuracy"] > 0.7


def test_a_killed_run_ends_with_the_same_weights(config, tmp_path, monkeypatch):
    whole = train(config)
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    kill_at_update(7, lambda: train(broken), monkeypatch)  # after the save at step 4
    resumed = train(broken)
    a, b = weights(whole.folder), weights(resumed.folder)
    assert all(torch.equal(a[n], b[n]) for n in a) and whole.validation == resumed.validation
    assert losses(whole.folder) == losses(resumed.folder)
    with pytest.raises(CheckpointError, match=r"other settings.*loss"):
        train(dataclasses.replace(broken, loss=LossOptions(margin=0.1)))


def test_a_resumed_run_wants_the_same_triplets_wherever_they_lie(config, triplets, tmp_path):
    whole = train(config)

    def resumed(root):
        return train(dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root))))

    moved = resumed(shutil.copy(triplets, tmp_path / "moved.hdf5"))
    assert moved.steps == 8 and moved.validation == whole.validation
    other = r"other settings \(triplets '36 samples, [0-9a-f]{16}', now '(24|36) samples, [0-9a-f]{16}'\); .*resume=false"
    for i, changes in enumerate(({"seed": 1}, {"K": K + 1}, {"T_prm": 2}, {"stochastic": {"dropout_p": 0.2}})):
        with pytest.raises(CheckpointError, match=other):
            resumed(build(tmp_path / f"{i}.hdf5", **changes))


def test_a_resumed_run_wants_the_same_pt_files_under_whatever_name(tmp_path):
    write_sketch_files(tmp_path / "first", 4)
    options = {"epochs": 1, "bs": 2, "out": tmp_path / "run", "model": {"width": 4, "depth": 1}, "data": {"valid": 0}}
    first = train_prm(tmp_path / "first", 8, **options)
    (tmp_path / "moved").mkdir()
    for i, file in enumerate(sorted((tmp_path / "first").iterdir())):
        shutil.copy(file, tmp_path / "moved" / f"{i}.pt")
    again = train_prm(tmp_path / "moved", 8, **options)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    torch.save({**torch.load(tmp_path / "moved" / "2.pt"), "best": torch.zeros(4, 8, 8)}, tmp_path / "moved" / "2.pt")
    with pytest.raises(CheckpointError, match=r"other settings \(triplets '4 samples, .*', now '4 samples, "):
        train_prm(tmp_path / "moved", 8, **options)


TWO = """
import os, sys
import torch
from ttcfast.cli.main import main
from ttcfast.rewards.prm import train
torch.set_num_threads(1)
child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
status = main(["train_prm", *sys.argv[1:]])
if child:
    status = status or os.waitstatus_to_exitcode(os.wait()[1])
sys.stdout.flush()
os._exit(status)
"""


def test_two_processes_follow_the_single_process(config, tmp_path):
    one = train(config)
    port = 29600 + os.getpid() % 300
    together = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    together |= {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    words = f"data.root={config.data.root} data.valid=0.25 model.kind=dense model.width=[6,8] model.depth=1 model.levels=2 optim.batch=4 "
    words += f"optim.steps=8 optim.warmup=2 optim.lr=3e-3 val_every=4 save_every=4 log_every=1 out={tmp_path / 'two'}"
    command = [sys.executable, "-c", TWO, *words.split()]  # forked, so that torch is imported once
    assert subprocess.run(command, env=together, cwd=Path(__file__).parents[4], timeout=180, check=False).returncode == 0
    ours, theirs = losses(one.folder), losses(tmp_path / "two")
    assert ours.keys() == theirs.keys() and list(theirs.values()) == pytest.approx(list(ours.values()), rel=1e-4)
    a, b = weights(one.folder), weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=2e-3)


def test_early_stopping_keeps_the_best(config):
    still = dataclasses.replace(config, optim=OptimOptions(batch=4, steps=200, lr=0.0), val_every=2, save_every=2, patience=3)
    with pytest.warns(RuntimeWarning, match="the scores of 100% of the validation groups are all the same"):  # it finds no fault yet
        result = train(still)
    assert result.steps == 8  # the first validation, and three that are no better
    assert result.validation["step"] == 2


def test_penalties_lower_what_they_penalise(config, triplets):
    frames = Triplets(triplets).frames([0, 1, 2, 3])
    torch.manual_seed(0)
    norm = Triplets(triplets).normalizer
    walls = torch.zeros(8, 8, dtype=torch.bool)
    walls[0] = True
    spec = StateSpec.euler2d(boundary_mask=walls, boundary_value=1.0)
    options = LossOptions(conservation=1.0, boundary=0.5)
    scalar = RewardLoss(PRM(8, 4, 1, normalizer=norm), options, spec).requires_grad_(False)
    terms = scalar(frames)
    assert float(terms["loss"]) == pytest.approx(float(terms["margin"] + terms["conservation"] + 0.5 * terms["boundary"]), rel=1e-5)
    assert float(terms["conservation"]) > 0 and float(terms["boundary"]) > 0
    dense = RewardLoss(DensePRM(8, 4, levels=1, normalizer=norm), options, spec)
    found = dense(frames)  # its field is 0, so what is left is the candidates' own
    change = ((frames[:, [1, 2, 3, 4]] - frames[:, :1]) / norm.delta_std.reshape(4, 1, 1)).mean((3, 4))
    assert float(found["conservation"]) == pytest.approx(float(change[:, [1, 2, 3, 0]].square().mean()), rel=1e-4)
    at_wall = (frames[:, [1, 2, 3, 4], :, 0] - 1) / norm.std.reshape(4, 1)
    assert float(found["boundary"]) == pytest.approx(float(at_wall.square().mean()), rel=1e-4)
    with pytest.raises(ValueError, match="nothing is conserved"):
        RewardLoss(PRM(8, 4, 1), LossOptions(conservation=1.0), StateSpec.euler2d(periodic=False))
    with pytest.raises(ValueError, match="no boundary_mask"):
        RewardLoss(PRM(8, 4, 1), LossOptions(boundary=1.0), StateSpec.euler2d())


def test_ranking_of_exact_reversed_and_constant_scores():
    errors = torch.tensor([[1.0, 0.5, 2.0, torch.nan], [2.0, 3.0, 1.0, 4.0]])
    exact = ranking(-errors, errors)
    assert (exact["regret"], exact["share"], exact["kendall_tau"], exact["pair_accuracy"]) == (1.0, 1.0, 1.0, 1.0)
    reverse = ranking(errors, errors)
    assert reverse["kendall_tau"] == -1.0 and reverse["regret"] == pytest.approx(6.0 / 1.5) and reverse["share"] < 0
    constant = ranking(torch.ones(2, 4), errors)
    assert constant["collapsed"] == 1.0 and constant["share"] == 0.0 and constant["kendall_tau"] == 0.0
    assert constant["chose_deterministic"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("model", [ModelOptions(width=6, depth=2), DENSE], ids=["scalar", "dense"])
def test_compiled_in_bfloat16_it_trains_and_scores(config, model):
    result = train(dataclasses.replace(config, model=model, precision="bfloat16", compile=True))
    exact = train(dataclasses.replace(config, model=model, out=config.out + "32"))
    assert losses(result.folder)[1] == pytest.approx(losses(exact.folder)[1], rel=0.02)
    frames = Triplets(config.data.root).frames([0, 1])
    state, group = frames[:, 0], frames[:, 1:5]
    eager = PRMScorer(result.prm).score(state, group)
    torch.testing.assert_close(PRMScorer(result.prm, compile=True).score(state, group), eager, rtol=1e-4, atol=1e-6)


def test_batches_depend_on_step_and_place_alone(triplets):
    held = Triplets(triplets)
    pool, apart = held.split(0.25, 0)
    assert not set(held.trajectory[pool]) & set(held.trajectory[apart]) and len(apart) == 9
    batches = Batches(held, pool, 4, AugmentOptions(input_noise=0.01, blend=0.5), seed=3)
    whole = batches.of_step(5, range(4))
    assert torch.equal(torch.cat([batches.of_step(5, range(2)), batches.of_step(5, range(2, 4))]), whole)
    assert not torch.equal(batches.of_step(6, range(4)), whole)
    plain = Batches(held, pool, len(pool), AugmentOptions(symmetry=False), seed=3).of_step(1, range(len(pool)))
    assert sorted(plain[:, 0].flatten(1).sum(1).tolist()) == sorted(held.frames(pool.tolist())[:, 0].flatten(1).sum(1).tolist())


def test_validation_over_all_k_makes_the_candidates_again_and_refuses_another_surrogate(tmp_path):
    sizes = {"width": 16, "depth": 1, "heads": 2, "refine": 4, "patch": 2, "dropout": 0.2}
    generate(GenerateConfig(split="train", n=3, out=str(tmp_path), presets=("riemann4",), grid=8, frames=4, t_end=0.2, per_file=4, batch=4))
    generate(GenerateConfig(split="valid", n=3, out=str(tmp_path), presets=("riemann4",), grid=8, frames=4, t_end=0.2, per_file=4, batch=4))
    common = {"data": str(tmp_path), "model": sizes, "steps": 3, "batch": 2, "valid": 1}
    first = train_surrogate(TrainConfig(out=str(tmp_path / "fm"), **common)).checkpoint
    from ttcfast.data import open_trajectories

    valid = open_trajectories(str(tmp_path), split="valid")
    made = build_triplets(load_surrogate(first), valid, tmp_path / "triplets" / "t.hdf5", K=K, T_prm=2)
    config = TrainPRMConfig(
        data=DataOptions(root=str(made), valid=0.4, valid_groups=2),
        fm=SurrogateOptions(str(first)),
        model=DENSE,
        optim=OptimOptions(steps=2, batch=2),
        out=str(tmp_path / "run"),
    )
    found = train(config).validation
    assert {"all/regret", "all/share", "all/kendall_tau", "all/pair_accuracy", "trivial/regret", "trivial/kendall_tau"} <= found.keys()
    held = Triplets(made)
    again = Validation(held, held.split(0.4, 0)[1], surrogate=load_surrogate(first), groups=2)
    candidates, truth = again.candidates(int(again.groups[0])), held.frames([int(again.groups[0])])[0, 5]
    mse = ((candidates - truth) / held.normalizer.std.reshape(4, 1, 1)).square().mean((1, 2, 3))
    torch.testing.assert_close(mse, torch.from_numpy(held.files[0].errors[int(again.groups[0])]), rtol=1e-3, atol=1e-7)
    other = train_surrogate(TrainConfig(out=str(tmp_path / "fm2"), seed=1, **common)).checkpoint
    with pytest.raises(DataError, match=r"made with surrogate .* and fm\.ckpt is .*"):
        train(dataclasses.replace(config, fm=SurrogateOptions(str(other)), out=str(tmp_path / "run2")))


def test_beside_the_stored_candidates_stands_the_trivial_scorer_with_the_same_columns(triplets):
    held = Triplets(triplets)
    _, apart = held.split(0.25, 0)
    torch.manual_seed(0)
    network = DensePRM(8, 4, levels=1, normalizer=held.normalizer)
    torch.nn.init.normal_(network.out.weight, std=0.05)
    found = Validation(held, apart).metrics(RewardLoss(network, LossOptions(), held.spec), torch.device("cpu"))
    frames = held.frames(apart.tolist())
    group = frames[:, [4, 1, 2, 3]]
    errors = ((group - frames[:, 5:]) / held.normalizer.std.reshape(4, 1, 1)).square().mean((2, 3, 4))
    near = -((group - frames[:, 4:5]) / held.normalizer.delta_std.reshape(4, 1, 1)).flatten(2).norm(dim=2)
    expected = ranking(near, errors)
    names = ("regret", "share", "kendall_tau", "pair_accuracy", "clear_pair_accuracy")
    assert {k for k in found if k.startswith("trivial_triplet/")} == {f"trivial_triplet/{name}" for name in names}
    for name in names:
        assert found[f"trivial_triplet/{name}"] == pytest.approx(expected[name], rel=1e-5) and f"triplet/{name}" in found
    assert found["trivial_triplet/kendall_tau"] != pytest.approx(found["triplet/kendall_tau"])


def write_sketch_files(folder, count):
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        state = torch.rand(4, 8, 8, generator=generator)
        kinds = {name: state + s * torch.randn(4, 8, 8, generator=generator) for name, s in (("best", 0.1), ("med", 0.3), ("worst", 0.6))}
        torch.save({"state_t": state, **kinds}, folder / f"triplet_{i:08d}.pt")


def test_the_plans_function_takes_its_own_files(tmp_path):
    write_sketch_files(tmp_path, 8)
    prm = train_prm([tmp_path], 8, epochs=2, lr=1e-3, margin=0.2, bs=4, model={"width": 6, "depth": 2})
    assert isinstance(prm, PRM) and prm.normalizer is None and not prm.training
    with pytest.raises(ArgumentError, match="in_ch is 10 and the triplets' states have 4 channels; give in_ch=8"):
        train_prm(tmp_path, 10)
    with pytest.raises(ValueError, match=r"margin is 0\.0"):
        train_prm(tmp_path, 8, margin=0.0)
    with pytest.raises(ArgumentError, match=r"\.pt files keep none"):
        train_prm(tmp_path, 8, epochs=1, model={"kind": "dense"})


def test_triplet_files_and_the_sketchs_are_not_trained_on_together(triplets, tmp_path):
    write_sketch_files(tmp_path / "sketch", 2)
    for roots in ([triplets, tmp_path / "sketch"], [tmp_path / "sketch", triplets]):
        with pytest.raises(DataError, match=r"mix triplet files and \.pt files, which have no normaliser; train on one kind"):
            train_prm(roots, 8, epochs=1)


def test_a_loss_that_is_not_finite_ends_the_run(config):
    with pytest.raises(TrainingError, match=r"lower optim\.lr"):
        train(dataclasses.replace(config, optim=OptimOptions(batch=4, steps=30, lr=1e12, warmup=0, clip=0.0)))


def test_the_plans_command_runs_as_printed(triplets, tmp_path, capsys):
    command = f"data.root={triplets} model.width=64 model.depth=6 optim.lr=3e-4 sched.cosine=True loss.margin=0.2".split()
    assert main(["train_prm", *command, "optim.steps=1", "optim.batch=2", f"out={tmp_path / 'run'}"]) == 0
    assert "reward model after 1 steps" in capsys.readouterr().out
    assert isinstance(PRM.from_pretrained(tmp_path / "run"), PRM)
    for margin in ("0", "inf", "wide"):
        assert main(["train_prm", f"data.root={triplets}", f"loss.margin={margin}", f"out={tmp_path / 'other'}"]) == 2
        assert "loss.margin is" in capsys.readouterr().err
