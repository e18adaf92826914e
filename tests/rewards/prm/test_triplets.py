"""Triplets: what is stored is what the keys say, a killed build ends with the same file, and every foreign file is one clear error."""

from __future__ import annotations

import os
import shutil

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.surrogates import Brittle, drop_surrogate, euler_state, shifted
from ttcfast.cli.main import main
from ttcfast.core.base_fm import Surrogate
from ttcfast.rewards.prm import build
from ttcfast.rewards.prm.build import build_triplets, pick
from ttcfast.rewards.prm.dataset import PRMTripletSet
from ttcfast.rewards.prm.triplet_file import TripletFile
from ttcfast.runtime.errors import DataError
from ttcfast.spec import StateSpec, StochasticConfig

STEPS, K = 3, 9


@pytest.fixture(scope="module")
def truth():
    return shifted(euler_state(4), STEPS)  # [4, 4, 4, 8, 8]


@pytest.fixture(scope="module")
def made(truth, tmp_path_factory):
    return build_triplets(
        drop_surrogate(), truth, tmp_path_factory.mktemp("triplets"), K=K, T_prm=STEPS, seed=3, on_policy=True, units="physical"
    )


def content(path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][:].tobytes() for name in ("frames", "errors", "picked", "step", "trajectory", "on_policy")}


def test_samples_are_the_candidates_that_the_keys_name(made, truth):
    file, fm = TripletFile(made), drop_surrogate()
    assert (len(file), file.K, file.shape, file.skipped) == (4 * (2 * STEPS - 1), K, (4, 8, 8), 0)
    for i in range(len(file)):
        state, best, median, worst, still, target = file.frames([i])[0]
        number, step = int(file.trajectory[i]), int(file.step[i])
        expected = truth[number, step]
        if file.on_policy[i]:
            expected = truth[number, 0]
            for _ in range(step):
                expected = fm.deterministic(expected[None])[0]
        torch.testing.assert_close(state, expected)
        assert torch.equal(target, truth[number, step + 1])
        group = fm.candidates(state[None], torch.arange(K), problem_ids=torch.tensor([number]), seed=3, step=step)[0]
        group[0] = fm.deterministic(state[None])[0]
        torch.testing.assert_close(still, group[0])
        errors = (group - target).square().flatten(1).mean(1)
        torch.testing.assert_close(torch.from_numpy(file.errors[i]), errors, rtol=1e-4, atol=1e-9)
        order = torch.from_numpy(file.errors[i]).argsort(stable=True)
        assert file.picked[i].tolist() == order[[0, K // 2, K - 1]].tolist()
        torch.testing.assert_close(torch.stack([best, median, worst]), group[torch.from_numpy(file.picked[i])])
    assert len({(int(t), int(s), bool(o)) for t, s, o in zip(file.trajectory, file.step, file.on_policy)}) == len(file)


def test_normalised_units_weigh_channels(truth, tmp_path):
    from ttcfast.core.normalizer import Normalizer

    std = torch.tensor([1.0, 0.1, 0.1, 2.0])
    fm = drop_surrogate(normalizer=Normalizer(torch.zeros(4), std))
    file = TripletFile(build_triplets(fm, truth[:1], tmp_path / "a.hdf5", K=4, T_prm=1))
    _, _, _, _, still, target = file.frames([0])[0]
    assert file.errors[0, 0] == pytest.approx(float(((still - target) / std[:, None, None]).square().mean()), rel=1e-5)
    assert torch.equal(file.normalizer.std, std)
    with pytest.raises(ValueError, match="units is 'normalized' and the surrogate has no normalizer; use units='physical'"):
        build_triplets(drop_surrogate(), truth, tmp_path / "b.hdf5", K=4, T_prm=1)


def test_a_killed_build_ends_with_the_same_file(made, truth, tmp_path, monkeypatch):
    rows, calls = build._Maker.rows, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rows(self, *args)

    options = {
        "K": K,
        "T_prm": STEPS,
        "seed": 3,
        "on_policy": True,
        "units": "physical",
        "memory_budget": 4 * 4 * 64 * K,
    }  # one trajectory each
    monkeypatch.setattr(build._Maker, "rows", killed)
    with pytest.raises(KeyboardInterrupt):
        build_triplets(drop_surrogate(), truth, tmp_path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["triplets.hdf5.partial"]
    with pytest.raises(DataError, match=r"holds no .hdf5 and no .pt file but the unfinished triplets.hdf5.partial"):
        PRMTripletSet(tmp_path)
    with pytest.raises(DataError, match=r"seed 3 instead of 4\); give another out=, or remove it"):
        build_triplets(drop_surrogate(), truth, tmp_path, **{**options, "seed": 4})
    path = build_triplets(drop_surrogate(), truth, tmp_path, **options)
    assert len(calls) == 3 + 2 and not (tmp_path / "triplets.hdf5.partial").exists()
    whole, resumed = content(made), content(path)
    assert all(whole[name] == resumed[name] for name in ("picked", "step", "trajectory", "on_policy"))
    np.testing.assert_allclose(np.frombuffer(resumed["frames"], "f4"), np.frombuffer(whole["frames"], "f4"), rtol=1e-5, atol=1e-6)
    build_triplets(drop_surrogate(), truth, tmp_path / "again.hdf5", **options)
    assert content(tmp_path / "again.hdf5") == resumed, "bit for bit as without the kill"
    assert build_triplets(drop_surrogate(), truth, tmp_path, **options) == path and len(calls) == 5 + 4, "nothing is made twice"


def test_surrogates_and_data_are_not_mixed(made, truth):
    options = {"K": K, "T_prm": STEPS, "seed": 3, "on_policy": True, "units": "physical"}
    with pytest.raises(DataError, match=r"made with another surrogate .* triplets of two surrogates are not mixed"):
        build_triplets(drop_surrogate(scale=0.02), truth, made, **options)
    with pytest.raises(DataError, match=r"made with other settings \(data "):
        build_triplets(drop_surrogate(), truth.flip(0), made, **options)
    with pytest.raises(DataError, match=r"stochastic .*'dropout_p': None.*instead of .*'dropout_p': 0.2"):
        build_triplets(drop_surrogate(), truth, made, **options, stochastic={"dropout_p": 0.2})


def test_bad_candidates_are_skipped_and_counted(tmp_path, caplog):
    x = euler_state(3)
    limit = float(x[:, 0, 0, 0].sort().values[1]) + 0.01  # of the three problems one lies below by far, one near, one above
    fm = Surrogate(Brittle(limit), StateSpec.euler2d(), stochastic=StochasticConfig(dropout=False, input_eps=0.02))
    with caplog.at_level("WARNING"):
        path = build_triplets(fm, shifted(x, 1), tmp_path, K=20, T_prm=1, units="physical")
    file = TripletFile(path)
    bad = ~np.isfinite(file.errors)
    assert file.skipped == 1 and 0 < bad.sum() < bad.size
    assert file.frames(range(len(file))).isfinite().all()
    assert not np.take_along_axis(bad, file.picked, 1).any()
    assert "are not finite and were skipped; 1 of 3 states have no triplet" in caplog.text


def test_the_median_is_that_of_the_finite_ones():
    nan = float("nan")
    assert pick(torch.tensor([3.0, nan, 1.0, 2.0, float("inf")])).tolist() == [2, 3, 0]
    assert pick(torch.tensor([1.0, nan, 1.0, 2.0, 4.0])).tolist() == [0, 3, 4]
    assert pick(torch.tensor([1.0, nan, 2.0])).tolist() == [-1, -1, -1]
    assert pick(torch.tensor([nan, 1.0, 2.0, 3.0])).tolist() == [-1, -1, -1]


def test_memory_does_not_grow_with_the_number_of_candidates(truth, tmp_path):
    fm = drop_surrogate()
    build_triplets(fm, truth[:1], tmp_path, K=40, T_prm=1, units="physical", memory_budget=5 * 4 * 4 * 64)
    assert max(fm.model.calls) <= 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_every_sample_once(made, workers):
    loader = DataLoader(PRMTripletSet([made, made]), batch_size=7, shuffle=True, num_workers=workers)
    seen = torch.cat([torch.stack(batch, 1) for batch in loader])
    expected = TripletFile(made).frames(range(20), first=4).repeat(2, 1, 1, 1, 1)
    assert sorted(seen.flatten(1).sum(1).tolist()) == sorted(expected.flatten(1).sum(1).tolist())


def test_what_is_taken_out_is_not_the_file(made):
    before = PRMTripletSet(made)[5]
    PRMTripletSet(made)[5][0].zero_()
    held = PRMTripletSet(made)
    held[5][1].zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, held[5]))
    assert torch.equal(held.errors(-1), torch.from_numpy(TripletFile(made).errors[-1]))


def test_a_file_rewritten_in_chunks_is_read(made, tmp_path):
    with h5py.File(made) as file, h5py.File(tmp_path / "chunked.hdf5", "w") as other:
        for name in file:
            file.copy(name, other) if name != "frames" else other.create_dataset(
                name, data=file[name][:], chunks=(1, *file[name].shape[1:]), compression="gzip"
            )
        other.attrs.update(dict(file.attrs))
    for ours, theirs in zip(PRMTripletSet(made), PRMTripletSet(tmp_path / "chunked.hdf5"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_the_sketchs_files_are_read(made, tmp_path):
    samples = PRMTripletSet(made)
    for i in range(3):
        torch.save(dict(zip(("state_t", "best", "med", "worst"), samples[i])), tmp_path / f"triplet_{i:08d}.pt")
    (tmp_path / "list.txt").write_text("triplet_00000001.pt\n\ntriplet_00000000.pt\n")
    found = PRMTripletSet(tmp_path)
    assert len(found) == 3 and all(torch.equal(a, b) for i in range(3) for a, b in zip(found[i], samples[i]))
    assert torch.equal(PRMTripletSet(tmp_path / "list.txt")[0][0], samples[1][0])
    with pytest.raises(DataError, match="holds three candidates and no errors"):
        found.errors(0)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/ttcfast_was_here",)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"state_t": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match=r"evil.pt is damaged, or holds something other than tensors, which is not opened"):
        PRMTripletSet(tmp_path / "evil.pt")[0]
    assert not os.path.exists("/tmp/ttcfast_was_here")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.zeros(3), "holds Tensor; expected a dict of the tensors state_t, best, med, worst"),
        ({"state_t": torch.zeros(3)}, "holds state_t: Tensor; expected"),
        ({**dict.fromkeys(("state_t", "best", "med", "worst"), torch.zeros(3)), "note": "hello"}, "holds note, which are no tensors"),
        ({"state_t": torch.zeros(3), **dict.fromkeys(("best", "med", "worst"), torch.zeros(2))}, "states of shapes (2,), (3,)"),
    ],
)
def test_pt_files_of_another_content_are_refused(tmp_path, held, message):
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(DataError, match=message.replace("(", r"\(").replace(")", r"\)")):
        PRMTripletSet([tmp_path / "a.pt"])[0]


def test_missing_empty_and_foreign_files_are_named(made, tmp_path):
    (tmp_path / "list.txt").write_text("nowhere.pt\n")
    with pytest.raises(DataError, match=r"nowhere.pt \(named by .*list.txt\) does not exist"):
        PRMTripletSet(tmp_path / "list.txt")
    with pytest.raises(DataError, match=r"gone.hdf5 does not exist; make it with `ttcfast build_prm_data`"):
        PRMTripletSet([tmp_path / "gone.hdf5"])
    with pytest.raises(DataError, match="manifest_paths is empty"):
        PRMTripletSet([])
    (tmp_path / "empty.hdf5").touch()
    with pytest.raises(DataError, match=r"empty.hdf5 is empty, truncated or no HDF5 file"):
        PRMTripletSet([tmp_path / "empty.hdf5"])
    with h5py.File(tmp_path / "foreign.hdf5", "w") as file:
        file["density"] = np.zeros(3)
    with pytest.raises(DataError, match=r"foreign.hdf5 holds density and is no triplet file"):
        PRMTripletSet([tmp_path / "foreign.hdf5"])
    short = shutil.copy(made, tmp_path / "short.hdf5")
    os.truncate(short, os.path.getsize(short) // 2)
    with pytest.raises(DataError, match=r"short.hdf5 is empty, truncated"):
        TripletFile(short)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("builder.K=2", "builder.K is 2; best, median and worst need at least 3 candidates"),
        ("builder.units=si", "builder.units is 'si'; it must be one of"),
        ("fm.ckpt=nowhere", "checkpoint nowhere does not exist"),
        ("data.n=0", "data.n is 0; it must be at least 1"),
    ],
)
def test_the_command_says_what_is_wrong(capsys, tmp_path, arguments, message):
    assert main(["build_prm_data", f"out={tmp_path}", *arguments.split()]) != 0
    assert message in capsys.readouterr().err
