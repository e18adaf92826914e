"""The example of examples/neuraloperator, from its data to its table: a model of neuraloperator, trained in two minutes."""

import csv
from pathlib import Path

import pytest

from ttcfast.cli.main import main
from ttcfast.data import open_trajectories
from ttcfast.metrics import rollout_mse

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_model_of_neuraloperator_is_trained_and_reaches_the_table(tmp_path, monkeypatch):
    pytest.importorskip("neuralop")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.neuraloperator.fno import make, train

    assert main(["generate", "system=kolmogorov", "split=train", "n=40", f"out={tmp_path / 'data'}"]) == 0
    weights = train(str(tmp_path / "data"), str(tmp_path / "fno"), seconds=120)
    small = ["eval.rollout_T=8", "ttc.branching_factor=4", "eval.solvers=[32]"]
    small += ["data.n=8", "data.split=null", "data.root=examples/kolmogorov"]
    given = ["fm.factory=examples.neuraloperator.fno:make", f"fm.args.weights={weights}", *small]
    assert main(["run_ttc", *given, "eval.one_step=true", f"out={tmp_path / 'run'}"]) == 0
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))
    error = {(row["method"], row["projection"]): float(row["rollout_mse"]) for row in rows}
    assert {"deterministic", "mean", "arm", "oracle"} <= {method for method, _ in error}
    truth = open_trajectories("examples/kolmogorov", split=None).first(8).stack()[:, :9]
    still = rollout_mse(truth[:, :1].expand_as(truth), truth, scale=make(weights).normalizer.std)[:, 1:].mean()
    assert error["deterministic", "False"] < 0.6 * float(still) and error["oracle", "False"] < 1.01 * error["deterministic", "False"]
