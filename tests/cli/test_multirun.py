"""``--multirun``: Hydra's sweeper and launchers, with our errors, names and exit status."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from tests.small_run import write_examples
from ttcfast.cli import multirun
from ttcfast.cli.configuration import compose
from ttcfast.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["grid=8", "frames=2", "t_end=0.05", "presets=[riemann4]", "n=1", "split=train"]


@pytest.fixture
def runs(monkeypatch):
    """The configurations that a multirun of run_ttc hands to its runs, instead of running them."""
    found: list[dict] = []
    monkeypatch.setattr("ttcfast.cli.run_ttc.run", found.append)

    def swept(*arguments: str) -> list[dict]:
        found.clear()
        assert main(["run_ttc", "--multirun", "fm.ckpt=a", *arguments]) == 0
        return list(found)

    return swept


def refusal(capsys, arguments: list[str]) -> tuple[int, str]:
    """The status and our line of a multirun that cannot be done."""
    capsys.readouterr()
    status = main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Error executing job with overrides: ")]
    assert len(lines) == 1 and lines[0].startswith("ttcfast: "), lines
    return status, lines[0]


def test_swept_values_are_combined_and_each_run_has_its_folder(runs, tmp_path):
    out = tmp_path / "a b"
    found = runs("ttc.branching_factor=1,3", "arm.scale=absolute,relative", "eval.sweep=[1,2]", f"out={out}")
    values = [(Path(run["out"]).name, run["ttc"]["branching_factor"], run["arm"]["scale"]) for run in found]
    assert values == [(f"branching_factor-{b},scale-{s}", b, s) for b in (1, 3) for s in ("absolute", "relative")]
    assert all(Path(run["out"]).parent == out and run["eval"]["sweep"] == [1, 2] for run in found)


def test_aliases_and_paths_are_swept_by_their_keys(runs, tmp_path):
    found = runs("use_prm=true,false", "stochastic.latent_sigma=0,0.1", "data.root=a/b,20240101", f"out={tmp_path}")
    assert [run["reward"]["type"] for run in found] == ["prm"] * 4 + ["arm"] * 4
    assert [run["ttc"]["stochastic"]["latent_sigma"] for run in found] == [0, 0, 0.1, 0.1] * 2
    assert [run["data"]["root"] for run in found] == ["a/b", "20240101"] * 4
    assert Path(found[0]["out"]) == tmp_path / "type-prm,latent_sigma-0,root-_a_b"


def ablation(name: str) -> dict[str, dict]:
    """The configuration of every run of an ablation."""
    return {run: compose("run_ttc", ["fm.ckpt=a", *settings]) for run, settings in multirun._ablation(name).items()}


def test_ablations_are_those_of_the_plan_and_more():
    noise = {name: run["ttc"] for name, run in ablation("noise").items()}
    assert noise.pop("none")["branching_factor"] == 1 and {t["branching_factor"] for t in noise.values()} == {16}
    on = {n: [k for k in ("dropout", "latent_sigma", "input_eps") if t["stochastic"][k]] for n, t in noise.items()}
    assert on == {"dropout": ["dropout"], "dropout_antithetic": ["dropout"], "latent": ["latent_sigma"], "input": ["input_eps"]}
    terms = {name: [k for k, w in run["arm"].items() if k.startswith("w_") and w] for name, run in ablation("arm").items()}
    assert all(len(terms.pop(scale)) == 5 for scale in ("absolute", "relative")) and sorted(map(len, terms.values())) == [1] * 5


def test_ablations_follow_each_other_and_are_stronger_than_other_arguments(runs, tmp_path):
    found = runs("ablation=rewards,branching", "data.n=64", "eval.methods=[mean]", f"out={tmp_path}")
    places = [str(Path(run["out"]).relative_to(tmp_path)) for run in found]
    assert places == [*(f"rewards/{r}" for r in ("baseline", "arm", "prm", "oracle")), *(f"branching/b{b}" for b in (1, 3, 5, 7, 16, 64))]
    assert [run["ttc"]["branching_factor"] for run in found[4:]] == [1, 3, 5, 7, 16, 64]
    assert [run["data"]["n"] for run in found[-2:]] == [64, 8]
    assert found[1]["eval"]["methods"] == ["deterministic", "arm"] and found[4]["eval"]["methods"] == ["mean"]
    alone = runs("ablation=rewards", f"out={tmp_path / 'alone'}")
    assert [Path(run["out"]).parent for run in alone] == [tmp_path / "alone"] * 4 and "variant" not in alone[0]


def test_hydras_own_keys_say_where_the_runs_go(runs, tmp_path):
    found = runs("ttc.seed=1,2", f"hydra.sweep.dir={tmp_path}/swept", "hydra.sweep.subdir=${hydra.job.num}")
    assert [run["out"] for run in found] == [f"{tmp_path}/swept/0", f"{tmp_path}/swept/1"]
    assert yaml.safe_load((tmp_path / "swept" / "1" / ".hydra" / "config.yaml").read_text())["ttc"]["seed"] == 2
    assert (tmp_path / "swept" / "multirun.yaml").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fm.ckpt=a"], "nothing to sweep; give key=a,b,c or ablation=<name> (arm, branching, noise, rewards)"),
        (["ablation=nose"], "ablation is 'nose'; there are arm, branching, noise, rewards"),
        (["ttc.branching_facto=1,2"], "unknown key 'ttc.branching_facto'; did you mean 'ttc.branching_factor'"),
        (["ttc.seed=1,1", "fm.ckpt=a"], "two runs of one name"),
        (["use_prm=maybe,false", "fm.ckpt=a"], "use_prm is 'maybe,false'; it must be true or false"),
        (["out=a,b", "fm.ckpt=a"], "out is the folder of all runs"),
        (["ablation=branching", "ttc.branching_factor=1,2", "fm.ckpt=a"], "ablation=branching sets ttc.branching_factor itself"),
        (["ttc.seed=1,2", "hydra/launcher=none_such", "fm.ckpt=a"], "no launcher 'none_such'; pip install"),
        (["ttc.seed=1,2", "hydra.sweep.dirr=x", "fm.ckpt=a"], "hydra.sweep.dirr"),
        (["ttc.seed=[a,1", "ablation=noise"], "ttc.seed=[a,1"),
    ],
)
def test_wrong_multiruns_are_one_line_before_any_run(capsys, arguments, message):
    status, line = refusal(capsys, ["run_ttc", "-m", *arguments])
    assert status == 2 and message in line


def test_a_command_without_an_output_folder(capsys):
    status, line = refusal(capsys, ["bench", "-m", "op=arm,topk"])
    assert status == 2 and "bench has no out" in line


def test_a_run_that_fails_gives_its_status_after_the_others(tmp_path, capsys):
    status, line = refusal(capsys, ["generate", "-m", *SMALL, f"out={tmp_path}", "frames=1,2"])
    assert (status, line) == (2, "ttcfast: frames is 1; it must be at least 2")
    assert list((tmp_path / "frames-2").rglob("*.hdf5")) and not list((tmp_path / "frames-1").rglob("*.hdf5"))
    (tmp_path / "frames-3").touch()
    assert refusal(capsys, ["generate", "-m", *SMALL, f"out={tmp_path}", "frames=2,3"])[0] == 1


def test_a_command_that_writes_one_file_writes_it_into_each_runs_folder(monkeypatch, tmp_path):
    found: list[str] = []
    monkeypatch.setattr("ttcfast.cli.fit_directions.run", lambda values: found.append(values["out"]))
    assert main(["fit_directions", "-m", "rank=2,4", f"out={tmp_path}/d.safetensors"]) == 0
    assert found == [f"{tmp_path}/rank-{rank}/d.safetensors" for rank in (2, 4)]


@pytest.mark.usefixtures("figures_undrawn")
def test_a_multirun_leaves_a_run_in_every_folder(tmp_path, capsys):
    (tmp_path / "examples").mkdir()
    examples = write_examples(tmp_path / "examples", steps=2)
    out = tmp_path / "runs"
    keys = [f"fm.ckpt={examples / 'surrogate.safetensors'}", f"data.root={examples}", "data.split=null", "data.n=1", "eval.rollout_T=1"]
    keys += ["eval.methods=[arm]", "eval.projection=false", "eval.horizons=[1]", "eval.shown=[]", "ttc.branching_factor=1,2", f"out={out}"]
    assert main(["run_ttc", "--multirun", *keys]) == 0
    held = {b: json.loads((out / f"branching_factor-{b}" / "metrics.json").read_text()) for b in (1, 2)}
    assert all([m["method"] for m in run["methods"]] == ["persistence", "deterministic", "arm"] for run in held.values())
    assert [run["methods"][2]["branching_factor"] for run in held.values()] == [1, 2]
    assert f"Side by side: ttcfast report {out}" in capsys.readouterr().out
    assert main(["report", str(out), f"out={tmp_path / 'page'}"]) == 0
    assert {f"branching_factor-{b}" in (tmp_path / "page" / "report.md").read_text() for b in (1, 2)} == {True}


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_run_in_processes_of_their_own(launcher, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "runs"
    status, line = refusal(capsys, ["generate", "--multirun", *SMALL, f"hydra/launcher={launcher}", f"out={out}", "frames=1,2"])
    assert (status, line) == (2, "ttcfast: frames is 1; it must be at least 2")
    assert list((out / "frames-2" / "data" / "train").glob("*.hdf5"))


def test_hydra_leaves_the_process_as_it_was(runs, tmp_path):
    before = (sys.argv, os.environ.get("HYDRA_FULL_ERROR"), multirun.logging.getLogger().handlers[:])
    runs("ttc.seed=1,2", f"out={tmp_path}")
    assert before == (sys.argv, os.environ.get("HYDRA_FULL_ERROR"), multirun.logging.getLogger().handlers[:])
