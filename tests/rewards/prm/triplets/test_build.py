"""Triplets: what is stored is what the keys say, a killed build ends with the same file, and every foreign file is one clear error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.flips import unnoticed
from tests.surrogates import brittle, drop_surrogate, euler_state, shifted
from ttcfast.rewards.prm.dataset import PRMTripletSet
from ttcfast.rewards.prm.triplets import build
from ttcfast.rewards.prm.triplets.build import build_triplets, pick
from ttcfast.rewards.prm.triplets.file import TripletFile
from ttcfast.runtime.errors import DataError

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


def test_a_history_is_seen_and_not_stored(tmp_path):
    fm, truth = drop_surrogate(history=2), shifted(euler_state(4), STEPS + 1)
    options = {"K": 4, "T_prm": STEPS, "seed": 3, "on_policy": True, "units": "physical"}
    file = TripletFile(build_triplets(fm, truth, tmp_path / "a.hdf5", **options))
    for i in range(len(file)):
        number, step = int(file.trajectory[i]), int(file.step[i])
        own = truth[number : number + 1, : step + 2]
        if file.on_policy[i]:
            own = own[:, :2]
            for t in range(step):
                own = torch.cat([own, fm.deterministic(own[:, -2:], step=t).unsqueeze(1)], 1)
        state, *picked, still, target = file.frames([i])[0]
        torch.testing.assert_close(torch.stack([state, target]), torch.stack([own[0, -1], truth[number, step + 2]]))
        group = fm.candidates(own[:, -2:], torch.arange(4), problem_ids=torch.tensor([number]), seed=3, step=step)[0]
        group[0] = fm.deterministic(own[:, -2:], step=step)[0]
        torch.testing.assert_close(torch.stack([*picked, still]), group[[*file.picked[i], 0]])
    with pytest.raises(
        DataError, match=r"T_prm is 4 and the trajectories have 5 frames; give at least 6 for history=2, or a smaller T_prm"
    ):
        build_triplets(fm, truth, tmp_path / "b.hdf5", **{**options, "T_prm": STEPS + 1})


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
    fm = brittle(limit, 0.02)
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


def test_the_surrogate_is_asked_for_no_more_than_the_budget_holds(truth, tmp_path):
    fm = drop_surrogate()
    build_triplets(fm, truth[:1], tmp_path, K=40, T_prm=1, units="physical", memory_budget=5 * 4 * 4 * 64)
    assert max(fm.model.calls) <= 5


PEAKS = """
import re
import sys
from pathlib import Path
from tests.surrogates import drop_surrogate, euler_state, shifted
from ttcfast.rewards.prm.triplets.build import build_triplets

truth, state = shifted(euler_state(1, 64), 1), 4 * 4 * 64 * 64
for i, (K, held) in enumerate(((8, 8), (8, 8), (800, 8), (800, 800))):
    build_triplets(drop_surrogate(), truth, f"{sys.argv[1]}/{i}.hdf5", K=K, T_prm=1, units="physical", memory_budget=held * state)
    print(1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


def test_memory_does_not_grow_with_the_number_of_candidates(tmp_path):
    # in a process of its own, and not by ru_maxrss, which a child takes over from its parent
    command = [sys.executable, "-c", PEAKS, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[4], timeout=120, check=True).stdout
    _, few, many, all_at_once = map(int, told.split())
    candidates = 800 * 4 * 4 * 64 * 64  # bytes: 52 MB
    assert many - few < candidates / 3
    assert all_at_once - few > candidates  # what the peak would be if they were held


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


def test_files_that_do_not_fit_together_are_refused(made, truth, tmp_path):
    options = {"K": 4, "T_prm": 1, "units": "physical"}
    other = build_triplets(drop_surrogate(scale=0.02), truth, tmp_path / "other.hdf5", **options)
    with pytest.raises(DataError, match=r"other.hdf5 was made with surrogate .* and .*triplets.hdf5 with .* not mixed; give files of one"):
        PRMTripletSet([made, other])
    wide = build_triplets(drop_surrogate(), shifted(euler_state(2, 16), 1), tmp_path / "wide.hdf5", **options)
    said = r"wide\.hdf5 holds states of shape \[4, 16, 16\] and .*triplets\.hdf5 of \[4, 8, 8\]; give files of one shape \[C, \*S\]"
    with pytest.raises(DataError, match=said):
        PRMTripletSet([made, wide])
    for i, size in enumerate((8, 16)):
        torch.save(dict.fromkeys(("state_t", "best", "med", "worst"), torch.zeros(4, size, size)), tmp_path / f"{i}.pt")
    for first in (made, tmp_path / "0.pt"):
        samples = PRMTripletSet([first, tmp_path / "1.pt"])
        assert samples.shape == (4, 8, 8)
        with pytest.raises(DataError, match=r"1\.pt holds states of shape \[4, 16, 16\] and .* of \[4, 8, 8\]; give files of one shape"):
            samples[len(samples) - 1]


def test_triplet_files_and_the_sketchs_may_be_read_as_one_set(made, tmp_path):
    state = torch.rand(4, 8, 8)
    torch.save(dict.fromkeys(("state_t", "best", "med", "worst"), state), tmp_path / "a.pt")
    for paths, at in (([tmp_path / "a.pt", made], 0), ([made, tmp_path / "a.pt"], -1)):
        samples = PRMTripletSet(paths)
        assert len(samples) == len(TripletFile(made)) + 1 and samples.shape == (4, 8, 8)
        assert all(torch.equal(frame, state) for frame in samples[at])


def test_a_file_without_a_usable_sample_is_refused(tmp_path):
    fm = brittle(0.0, 0.02)
    path = build_triplets(fm, shifted(euler_state(3), 1), tmp_path, K=4, T_prm=1, units="physical")
    with pytest.raises(DataError, match=r"holds no usable sample \(3 skipped, whose candidates are not finite\); make it again with"):
        PRMTripletSet(path)


def test_an_unfinished_file_is_refused_under_any_name(truth, tmp_path, monkeypatch):
    monkeypatch.setattr(build.TripletWriter, "complete", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_triplets(drop_surrogate(), truth, tmp_path, K=4, T_prm=1, units="physical")
    partial = tmp_path / "triplets.hdf5.partial"
    with pytest.raises(DataError, match=r"triplets.hdf5.partial is unfinished; run the command that makes it once more"):
        PRMTripletSet(partial)
    renamed = shutil.copy(partial, tmp_path / "named.hdf5")
    with pytest.raises(DataError, match=r"named.hdf5 is unfinished \(4 of 4 samples\); run the command that makes it once more"):
        PRMTripletSet([renamed])


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
    with pytest.raises(DataError, match=r"foreign.hdf5 holds density and is not a triplet file"):
        PRMTripletSet([tmp_path / "foreign.hdf5"])
    short = shutil.copy(made, tmp_path / "short.hdf5")
    os.truncate(short, os.path.getsize(short) // 2)
    with pytest.raises(DataError, match=r"short.hdf5 is empty, truncated"):
        TripletFile(short)


def everything(path) -> tuple:
    file = TripletFile(path)
    arrays = (file.errors, file.picked, file.step, file.trajectory, file.on_policy, file.frames(range(len(file))).numpy())
    normalizer = (file.normalizer.mean, file.normalizer.std, file.normalizer.delta_std)
    return (file.surrogate, str(file.config), str(file.spec), *(a.tobytes() for a in arrays), *(n.numpy().tobytes() for n in normalizer))


@pytest.mark.parametrize("size", [8, 9], ids=["even", "odd"])
def test_a_flipped_bit_is_noticed(size, tmp_path):
    path = build_triplets(drop_surrogate(), shifted(euler_state(2, size), 1), tmp_path, K=4, T_prm=1, units="physical")
    assert unnoticed(path, lambda: everything(path), 80) == []
    assert unnoticed(path, lambda: everything(path), 80, last=6000) == [], "what lies beside the frames"


def test_frames_are_compared_where_a_tool_has_chunked_them(made, tmp_path):
    with h5py.File(made) as file, h5py.File(tmp_path / "chunked.hdf5", "w") as other:
        for name in file:
            file.copy(name, other)
        other.attrs.update(dict(file.attrs))
        values = file["frames"][:]
        values[3, 2, 0, 0, 0] += 1e-6
        del other["frames"]
        other.create_dataset("frames", data=values, chunks=(1, *values.shape[1:]))
    held = TripletFile(tmp_path / "chunked.hdf5")
    assert held.frames([0, 1, 2]).isfinite().all() and held.frames([3], first=2).isfinite().all()
    with pytest.raises(DataError, match=r"chunked.hdf5 is damaged \(the checksums of sample 3 do not match its frames\)"):
        held.frames([2, 3], first=4)


def test_a_file_of_an_older_version_opens_and_says_that_it_has_none(made, tmp_path, caplog):
    old = shutil.copy(made, tmp_path / "old.hdf5")
    with h5py.File(old, "r+") as file:
        del file.attrs["checksum"], file["sums"]
    with caplog.at_level("INFO"):
        assert everything(old) == everything(made)
    assert "old.hdf5 was written by an older ttcfast without checksums" in caplog.text and len(caplog.records) == 1


def test_a_second_build_is_told_of_the_first_and_not_to_delete_its_data(truth, tmp_path, monkeypatch):
    rows, said = build._Maker.rows, []

    def meanwhile(self, *args):
        if not said:

            def second() -> None:
                try:
                    build_triplets(drop_surrogate(), truth, tmp_path / "triplets.hdf5", K=4, T_prm=1, units="physical")
                except Exception as error:
                    said.append(str(error))

            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        return rows(self, *args)

    monkeypatch.setattr(build._Maker, "rows", meanwhile)
    path = build_triplets(drop_surrogate(), truth, tmp_path, K=4, T_prm=1, units="physical")
    assert len(said) == 1 and "another run is writing there (" in said[0] and "remove" not in said[0]
    assert len(TripletFile(path)) == 4
