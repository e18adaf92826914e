import json

import pytest

from tests.report.small_run import write_examples
from ttcfast.cli.main import main
from ttcfast.cli.multirun import jobs
from ttcfast.runtime.errors import ArgumentError


def test_swept_values_are_combined_and_each_run_has_its_folder():
    found = jobs("run_ttc", ["fm.ckpt=a", "ttc.branching_factor=1,3", "arm.scale=absolute,relative", "eval.sweep=[1,2]", "out=/tmp/a b"])
    values = [(j.name, j.values["ttc"]["branching_factor"], j.values["arm"]["scale"], j.values["out"]) for j in found]
    names = [f"branching_factor-{b},scale-{s}" for b in (1, 3) for s in ("absolute", "relative")]
    assert values == [(n, int(n[17]), n.partition("scale-")[2], f"/tmp/a b/{n}") for n in names]
    assert all(j.values["eval"]["sweep"] == [1, 2] for j in found)


def test_ablations_are_those_of_the_seed_and_more():
    assert [j.values["ttc"]["branching_factor"] for j in jobs("run_ttc", ["ablation=branching", "fm.ckpt=a"])] == [1, 3, 5, 7, 16, 64]
    assert jobs("run_ttc", ["ablation=branching", "fm.ckpt=a", "data.n=64"])[-1].values["data"]["n"] == 8
    noise = {j.name: j.values["ttc"] for j in jobs("run_ttc", ["ablation=noise", "fm.ckpt=a"])}
    assert noise.pop("none")["branching_factor"] == 1 and {t["branching_factor"] for t in noise.values()} == {16}
    on = {n: [k for k in ("dropout", "latent_sigma", "input_eps") if t["stochastic"][k]] for n, t in noise.items()}
    assert on == {"dropout": ["dropout"], "dropout_antithetic": ["dropout"], "latent": ["latent_sigma"], "input": ["input_eps"]}
    terms = {
        j.name: [k for k, w in j.values["arm"].items() if k.startswith("w_") and w] for j in jobs("run_ttc", ["ablation=arm", "fm.ckpt=a"])
    }
    assert all(len(terms.pop(scale)) == 5 for scale in ("absolute", "relative")) and sorted(map(len, terms.values())) == [1] * 5
    both = jobs("run_ttc", ["ablation=rewards,arm", "fm.ckpt=a", "ttc.seed=0,1"])
    assert [j.name for j in both][:3] == ["rewards/baseline/seed-0", "rewards/baseline/seed-1", "rewards/arm/seed-0"] and len(both) == 22


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fm.ckpt=a"], r"nothing to sweep; give key=a,b,c or ablation=<name> \(arm, branching, noise, rewards\)"),
        (["ablation=nose"], "ablation is 'nose'; there are arm, branching, noise, rewards"),
        (["ttc.branching_facto=1,2"], "unknown key 'ttc.branching_facto'; did you mean 'ttc.branching_factor'"),
        (["ttc.seed=1,1", "fm.ckpt=a"], "two runs of one name"),
    ],
)
def test_wrong_multiruns(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        jobs("run_ttc", arguments)


def test_a_multirun_leaves_a_run_in_every_folder(tmp_path, capsys):
    (tmp_path / "examples").mkdir()
    examples = write_examples(tmp_path / "examples", steps=2)
    out = tmp_path / "runs"
    keys = [f"fm.ckpt={examples / 'surrogate.safetensors'}", f"data.root={examples}", "data.split=null", "data.n=1", "eval.rollout_T=1"]
    keys += ["eval.methods=[arm]", "eval.projection=false", "eval.horizons=[1]", "eval.shown=[]", "ttc.branching_factor=1,2", f"out={out}"]
    assert main(["run_ttc", "--multirun", *keys]) == 0
    held = {b: json.loads((out / f"branching_factor-{b}" / "metrics.json").read_text()) for b in (1, 2)}
    assert all([m["method"] for m in run["methods"]] == ["deterministic", "arm"] for run in held.values())
    assert [run["methods"][1]["branching_factor"] for run in held.values()] == [1, 2]
    text = capsys.readouterr().out
    assert "[2/2] branching_factor-2" in text and f"runs=[{out}/branching_factor-1,{out}/branching_factor-2]" in text
