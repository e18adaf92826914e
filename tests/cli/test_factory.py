"""``fm.factory``: a model of the user's own, of physics that is no gas, through the commands that take a checkpoint of ours."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
import yaml

from tests.foreign import SPEC, make, make_extrapolate, trajectories, write_data
from tests.small_run import undrawn
from ttcfast.cli.configuration import compose
from ttcfast.cli.main import main
from ttcfast.core.base_fm import Surrogate
from ttcfast.data import write_well
from ttcfast.metrics import relative_l1, rollout_mse
from ttcfast.models import surrogate_hash
from ttcfast.models.factory import open_surrogate
from ttcfast.rewards.prm.model import PRM
from ttcfast.rewards.prm.triplets.file import TripletFile
from ttcfast.spec import StateSpec

ROOT = Path(__file__).resolve().parents[2]
FACTORY = "fm.factory=tests.foreign:make"
EXTRAPOLATE = "fm.factory=tests.foreign:make_extrapolate"
SHORT = ["eval.rollout_T=4", "ttc.branching_factor=3", "eval.calibration=4", "arm.w_positivity=0.1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "summary.csv").open()))


def test_a_foreign_model_reaches_table_figures_sweep_and_page(data, tmp_path, capsys):
    out = tmp_path / "run"
    sweep = ["eval.sweep=[1,2]", "eval.sweep_problems=2"]
    assert main(["run_ttc", FACTORY, "fm.args.bias=0.05", f"data.root={data}", *SHORT, *sweep, f"out={out}"]) == 0
    found = {(row["method"], row["projection"]): row for row in rows(out)}
    assert {"persistence", "deterministic", "random", "mean", "arm", "oracle"} == {method for method, _ in found}
    drifts = [name for name in found["arm", "True"] if name.startswith("drift_")]
    assert drifts == ["drift_tracer"] and float(found["arm", "True"]["drift_tracer"]) < 1e-6 < float(found["arm", "False"]["drift_tracer"])
    assert float(found["oracle", "False"]["rollout_mse"]) < float(found["deterministic", "False"]["rollout_mse"])
    assert (
        "drift: the relative drift of tracer after 4 steps" in (out / "table.md").read_text() and "momentum" not in capsys.readouterr().out
    )
    figures = {path.stem for path in (out / "figures").glob("*.png")}
    assert {"error_time", "drift_time", "error_branching", "drift_branching", "fields_problem0", "gain_histogram"} <= figures
    assert "tracer" in (out / "figures" / "drift_time.svg").read_text()
    held = json.loads((out / "metrics.json").read_text())
    model = held["provenance"]["model"]
    assert (model["factory"], model["args"]) == ("tests.foreign:make", {"bias": 0.05}) and len(model["weights"]) == 64
    assert yaml.safe_load((out / "run_ttc.yaml").read_text())["ttc"]["stochastic"] is None and model["stochastic"]["dropout_p"] == 0.4, (
        "candidates have the model's own noise"
    )
    assert set(held["truth_drift_by_step"]) == {"tracer"}
    assert main(["report", str(out), f"out={tmp_path / 'page'}"]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "relative drift of tracer" in page and "mass, momentum and energy" not in page


def test_where_nothing_is_conserved_there_is_no_drift(tmp_path):
    folder, out = (
        write_data(tmp_path / "data", spec=StateSpec.fields(*SPEC.names, given="mask", bounds={"tracer": (0, None)})),
        tmp_path / "run",
    )
    given = [FACTORY, "fm.args={conserved: false}", f"data.root={folder}", *SHORT, "eval.sweep=[1,2]", "eval.sweep_problems=1"]
    assert main(["run_ttc", *given, f"out={out}"]) == 0
    assert not any(name.startswith("drift") for name in rows(out)[0]) and {row["projection"] for row in rows(out)} == {"False"}
    assert not [path for path in (out / "figures").iterdir() if "drift" in path.name]
    table = (out / "table.md").read_text()
    assert "drift" not in table and "the layout declares nothing that is conserved" in table
    assert main(["report", str(out), f"out={tmp_path / 'page'}"]) == 0
    assert "drift" not in (tmp_path / "page" / "report.md").read_text().split("\n\n")[0]


def test_a_model_says_what_a_file_without_a_layout_leaves_open(tmp_path):
    folder, out = write_data(tmp_path / "data"), tmp_path / "run"
    with h5py.File(folder / "data" / "test" / "a.hdf5", "r+") as file:
        del file.attrs["ttcfast_layout"], file.attrs["ttcfast_checksum"]
    with undrawn():
        assert main(["run_ttc", FACTORY, f"data.root={folder}", *SHORT, f"out={out}"]) == 0
    assert "drift_tracer" in rows(out)[0] and any(row["projection"] == "True" for row in rows(out))


def test_a_model_that_sees_two_frames_is_measured_from_the_second_on(data, tmp_path):
    truth, fm, alone = trajectories(seed=3), make_extrapolate(), tmp_path / "alone"
    mean, std = fm.normalizer.mean, fm.normalizer.std
    bias = 0.01 * std.view(-1, 1, 1) * torch.tensor([1, 1, 1, 0]).view(-1, 1, 1)

    def stepped(before, latest, step):
        return latest + (latest - before) + bias * step

    rolled = [truth[:, 0], truth[:, 1]]
    for step in range(4):
        rolled.append(stepped(*rolled[-2:], step))
    given = [EXTRAPOLATE, f"data.root={data}", *SHORT, "eval.one_step=true", "eval.sweep=[1,2]", "eval.sweep_problems=2"]
    with undrawn():
        assert main(["run_ttc", *given, f"out={alone}"]) == 0
        assert main(["run_ttc", *given, "ttc.chunk_size=2", f"out={tmp_path / 'chunks'}"]) == 0
    predicted = slice(0, 3)  # without the mask
    expected = rollout_mse(torch.stack(rolled[1:], 1)[:, :, predicted], truth[:, 1:, predicted], scale=std[predicted])
    found = json.loads((alone / "rows.json").read_text())["results"]
    assert (found[0]["method"], found[0]["projected"]) == ("deterministic", False)
    torch.testing.assert_close(torch.tensor(found[0]["mse"], dtype=torch.float64), expected, rtol=1e-4, atol=1e-9)
    held = json.loads((alone / "metrics.json").read_text())
    still = rollout_mse(truth[:, 1:2, predicted].expand(-1, 5, -1, -1, -1), truth[:, 1:, predicted], scale=std[predicted]).mean(0)
    torch.testing.assert_close(torch.tensor(held["persistence_mse_by_step"], dtype=torch.float64), still, rtol=1e-4, atol=1e-9)
    single = torch.stack([stepped(truth[:, t], truth[:, t + 1], t) for t in range(4)], 1)
    units = {"mean": mean[predicted], "scale": std[predicted]}
    guesses = (single, truth[:, 1:-1])
    errors = [100 * float(relative_l1(guess[:, :, predicted], truth[:, 2:, predicted], **units).mean()) for guess in guesses]
    one_step = f"along the truth: relative L1 {errors[0]:.2f} %; copying the last frame: {errors[1]:.2f} %"
    assert one_step in (alone / "table.md").read_text()
    scores = json.loads((alone / "calibration.json").read_text())
    for problem, step, group in zip(scores["problems"], scores["steps"], scores["errors"], strict=True):
        error = ((single[problem, step] - truth[problem, step + 2]) / std.view(-1, 1, 1))[predicted].square().mean()
        assert group[0] == pytest.approx(float(error), rel=1e-4)
    chunked, whole = ([float(row["rollout_mse"]) for row in rows(folder)] for folder in (tmp_path / "chunks", alone))
    assert chunked == pytest.approx(whole, rel=1e-5)


def test_ceiling_and_triplets_of_a_model_that_sees_two_frames(data, tmp_path, capsys):
    fm = make_extrapolate()
    sources = ["sources.latent=null", "sources.directions=null", "sources.antithetic=null", "data.n=1", "states=[2]", "factors=[2]"]
    assert main(["ceiling", EXTRAPOLATE, *sources, f"data.root={data}", f"out={tmp_path / 'ceiling'}"]) == 0
    truth = trajectories(seed=3)[:1]
    drawn = fm.candidates(truth[:, 2:4], torch.tensor([1]), seed=0, step=2)[:, 0]
    errors = [
        (((x - truth[:, 4]) / fm.normalizer.std.view(-1, 1, 1)).square().mean()) for x in (fm.deterministic(truth[:, 2:4], step=2), drawn)
    ]
    (row, *_) = json.loads((tmp_path / "ceiling" / "ceiling.json").read_text())["rows"]
    assert row["one_step"] == pytest.approx(float(min(errors) / errors[0]), rel=1e-4)
    triplets = ["builder.K=4", "builder.T_prm=3", "stochastic.latent_sigma=0", f"data.root={data}", f"out={tmp_path / 'triplets'}"]
    assert main(["build_prm_data", EXTRAPOLATE, *triplets]) == 0
    made = TripletFile(tmp_path / "triplets")
    state, *_, target = made.frames([2])[0]
    truth = trajectories(seed=2)[int(made.trajectory[2])]
    torch.testing.assert_close(torch.stack([state, target]), truth[int(made.step[2]) + 1 :][:2])
    capsys.readouterr()
    assert main(["train_prm_on_policy", EXTRAPOLATE, f"data={data}", f"out={tmp_path / 'dense'}"]) == 2
    assert "make_extrapolate with history=2 and train_prm_on_policy steps from single states; give a model" in capsys.readouterr().err


def test_trajectories_too_short_for_the_history_are_named(tmp_path, capsys):
    write_well(tmp_path / "a.hdf5", trajectories(1, frames=2), range(2), SPEC, dataset_name="a")
    given = [f"data.root={tmp_path / 'a.hdf5'}", "data.split=null", f"out={tmp_path / 'out'}"]
    assert main(["run_ttc", EXTRAPOLATE, *given]) == 1
    said = (
        "2 frames and tests.foreign:make_extrapolate has history=2; give trajectories of 3 frames or more, or a surrogate that sees fewer"
    )
    assert said in capsys.readouterr().err


def test_a_resumed_run_needs_the_same_factory_and_arguments(data, tmp_path, capsys):
    run = ["run_ttc", FACTORY, f"data.root={data}", *SHORT, "run.resume=true", f"out={tmp_path}", "eval.methods=[arm]", "data.n=1"]
    with undrawn():
        assert main(run) == 0 and main(run) == 0
        capsys.readouterr()
        assert main([*run, "fm.args.bias=0.03"]) == 1
    said = capsys.readouterr().err
    assert "holds a rollout of another configuration" in said and "fm.args.bias" not in said and "bias is 0.03, there 0.02" in said


def test_triplets_reward_and_ceiling_of_a_foreign_model(data, tmp_path, capsys):
    triplets = ["builder.K=4", "builder.T_prm=2", f"data.root={data}", f"out={tmp_path / 'triplets'}"]
    assert main(["build_prm_data", FACTORY, *triplets]) == 0
    made = TripletFile(tmp_path / "triplets")
    assert made.spec.to_meta() == SPEC.to_meta() | {"spacing": made.spec.spacing} and made.shape == (4, 12, 12)
    model = json.loads((tmp_path / "triplets" / "triplets.model.json").read_text())
    assert model["weights"] == made.surrogate and model["factory"] == "tests.foreign:make"
    sizes = ["model.width=4", "model.depth=2", "optim.steps=2", "optim.batch=2", "data.valid=0.25", "data.valid_samples=4", "log_every=1"]
    assert main(["train_prm", f"data.root={tmp_path / 'triplets'}", *sizes, f"out={tmp_path / 'prm'}"]) == 0
    assert PRM.from_pretrained(tmp_path / "prm").spec.names == SPEC.names
    dense = [f"data={data}", "model.width=[4,4]", "model.levels=2", "steps=2", "batch=2", "valid=2", f"out={tmp_path / 'dense'}"]
    assert main(["train_prm_on_policy", FACTORY, *dense]) == 0
    network = PRM.from_pretrained(tmp_path / "dense")
    assert network.residual is None and network.info["model"]["weights"] == made.surrogate
    capsys.readouterr()
    assert main(["train_prm_on_policy", FACTORY, "fm.args.bias=0.5", *dense]) == 1
    assert "args" in capsys.readouterr().err
    sources = ["sources.latent=null", "sources.directions=null", "sources.antithetic=null", "data.n=1", "states=[0]", "factors=[2]"]
    assert main(["ceiling", FACTORY, *sources, f"data.root={data}", f"out={tmp_path / 'ceiling'}"]) == 0
    assert json.loads((tmp_path / "ceiling" / "ceiling.json").read_text())["provenance"]["model"]["args"] == {}
    run = ["run_ttc", FACTORY, f"data.root={data}", *SHORT, f"prm.ckpt={tmp_path / 'dense'}", f"out={tmp_path / 'run'}", "data.n=2"]
    with undrawn():
        assert main(run) == 0
    assert {"prm", "arm_prm"} <= {row["method"] for row in rows(tmp_path / "run")}


def test_every_run_of_a_sweep_makes_the_model(data, tmp_path):
    run = [FACTORY, f"data.root={data}", *SHORT, "fm.args.bias=0.02,0.3", "data.n=1", f"out={tmp_path}", "eval.methods=[arm]"]
    with undrawn():
        assert main(["run_ttc", "--multirun", *run]) == 0
    errors = [float(rows(tmp_path / f"bias-{bias}")[1]["rollout_mse"]) for bias in ("0.02", "0.3")]
    assert errors[0] < errors[1]


def test_the_working_directory_is_importable(data, tmp_path):
    (tmp_path / "mine.py").write_text("from tests.foreign import make as made\n\ndef build(bias):\n    return made(bias)\n")
    keys = [
        "fm.factory=mine:build",
        "fm.args.bias=0.1",
        f"data.root={data}",
        "data.n=1",
        "states=[0]",
        "factors=[2]",
        "sources.latent=null",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = "import sys; sys.path = [p for p in sys.path if p]; from ttcfast.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "ceiling", *keys, "sources.latent=null", f"out={tmp_path / 'out'}"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "out" / "ceiling.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("factory", [FACTORY, EXTRAPOLATE])
def test_two_processes_write_what_one_writes(data, tmp_path, factory):
    keys = [factory, f"data.root={data}", *SHORT, "data.n=2", "eval.calibration=0", "ttc.chunk_size=8"]
    alone = [sys.executable, "-m", "ttcfast.cli.run_ttc", *keys, f"out={tmp_path / 'alone'}"]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *alone[1:-1], "ttc.shard=problems"]
    run = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "check": True, "stdout": subprocess.PIPE, "text": True}
    subprocess.run(alone, **run)
    subprocess.run([*several, f"out={tmp_path / 'several'}"], **run)
    held = [rows(tmp_path / name) for name in ("alone", "several")]
    one, other = ([{k: v for k, v in row.items() if k not in ("seconds", "peak_bytes")} for row in found] for found in held)
    assert one == other and any(row["method"] == "arm" for row in one)


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ([], 2, "fm.ckpt is not given, and no fm.factory either; add fm.ckpt=<file of ttcfast train_fm> or fm.factory=package.module:"),
        (["fm.ckpt=a", "fm.factory=b:c"], 2, "fm.ckpt is a and fm.factory is b:c; give one of them"),
        (["fm.ckpt=a", "fm.args.width=3"], 2, "fm.args is {'width': 3} and fm.factory is null; they are the arguments of a factory"),
        (["fm.factory=tests.foreign"], 2, "fm.factory is 'tests.foreign'; write package.module:function"),
        (["fm.factory=tests/foreign.py:make"], 2, "write package.module:function, with dots and no .py"),
        (["fm.factory=no_such.thing:make"], 2, "there is no module 'no_such' in "),
        (["fm.factory=tests.no_such:make"], 2, "there is no module 'tests.no_such' in "),
        (["fm.factory=tests.foreign:no"], 2, "tests.foreign has no 'no'; it has Drift, make, "),
        (
            ["fm.factory=tests.foreign:GRID"],
            2,
            "fm.factory is tests.foreign:GRID, which is a int; name a function that returns a Surrogate",
        ),
        (["fm.factory=tests.foreign:not_a_surrogate"], 2, "returned a Linear; return ttcfast.core.base_fm.Surrogate(model, spec, ...)"),
        (["fm.factory=tests.foreign:failing"], 1, "fm.factory tests.foreign:failing raised RuntimeError: the weights are not there"),
        ([FACTORY, "fm.args.width=3"], 2, "does not fit tests.foreign:make(bias: 'float' = 0.02, normalized: 'bool' = True, "),
    ],
)
def test_wrong_factories_are_one_clear_line(data, tmp_path, capsys, given, status, said):
    for command in ("run_ttc", "train_prm_on_policy"):
        place = f"data={data}" if command == "train_prm_on_policy" else f"data.root={data}"
        assert main([command, *given, place, f"out={tmp_path / command}"]) == status
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ttcfast: ")]
        assert len(lines) == 1 and said in lines[0]


def test_a_factory_takes_the_place_of_a_default_checkpoint():
    for command in ("build_prm_data", "ceiling"):
        assert compose(command, [])["fm"]["ckpt"] == "runs/train_fm/surrogate.safetensors"
        assert compose(command, ["fm.factory=a:b", "fm.args={x: [1, 2]}"])["fm"] == {"ckpt": None, "factory": "a:b", "args": {"x": [1, 2]}}
        assert compose(command, ["fm.factory=a:b", "fm.ckpt=c"])["fm"]["ckpt"] == "c"  # which the command refuses
    assert compose("train_prm_on_policy", ["fm=x"])["fm"]["ckpt"] == "x"


def test_data_that_lack_a_channel_are_named(tmp_path, capsys):
    spec = StateSpec.fields("tracer", "p", spacing=(0.5, 0.5), cell_volume=0.25)
    write_well(tmp_path / "a.hdf5", torch.rand(1, 6, 2, 12, 12), range(6), spec, dataset_name="a")
    assert main(["run_ttc", FACTORY, f"data.root={tmp_path / 'a.hdf5'}", "data.split=null", f"out={tmp_path / 'out'}"]) == 1
    said = capsys.readouterr().err
    assert "cannot be read in the channels asked for: source has no velocity_x, velocity_y, mask; it has channels tracer, p" in said


def test_weights_that_a_factory_draws_are_the_same_in_every_process():
    torch.manual_seed(1)
    first = open_surrogate(None, "tests.foreign:make")
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))  # the stream of the caller is untouched
    assert surrogate_hash(first) == surrogate_hash(open_surrogate(None, "tests.foreign:make", {}))
    assert surrogate_hash(first) != surrogate_hash(make())


def test_the_hash_of_a_model_that_keeps_more_than_tensors(tmp_path):
    class Noted(torch.nn.Conv2d):
        def get_extra_state(self):
            return {"made by": "another package"}

    def hash_of(bias):
        net = Noted(1, 1, 1)
        torch.nn.init.constant_(net.weight, 0.5)
        torch.nn.init.constant_(net.bias, bias)
        return surrogate_hash(Surrogate(net, StateSpec.fields("u")))

    assert hash_of(0.5) == hash_of(0.5) != hash_of(0.25)
    spectral = torch.nn.Module()
    spectral.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    assert len(surrogate_hash(Surrogate(spectral, StateSpec.fields("u")))) == 64


def test_a_reward_is_not_trained_on_a_model_that_follows_time(data, tmp_path, capsys):
    given = ["fm.factory=tests.foreign:conditioned", f"data={data}", f"out={tmp_path / 'out'}"]
    assert main(["train_prm_on_policy", *given]) == 2
    said = "the surrogate of tests.foreign:conditioned has inputs, and here each state stands at a time of its own; give one without inputs"
    assert said in capsys.readouterr().err


def test_rows_with_all_that_is_declared(tmp_path):
    spec = StateSpec.fields(*SPEC.names, given="mask", bounds={"tracer": (1.0, None)})
    folder, out = write_data(tmp_path / "data", spec=spec), tmp_path / "run"
    given = ["fm.factory=tests.foreign:within", f"data.root={folder}", *SHORT, "eval.oracle=false"]
    assert main(["run_ttc", *given, "ttc.project=declared", f"out={out}"]) == 0
    assert {row["projection"] for row in rows(out)} == {"False", "True"}
    assert main(["run_ttc", *given, f"out={tmp_path / 'other'}"]) == 0
    assert {row["projection"] for row in rows(tmp_path / "other")} == {"False"}
