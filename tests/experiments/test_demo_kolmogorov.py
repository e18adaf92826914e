"""``ttcfast demo system=kolmogorov`` on the shipped data and surrogate."""

import json

import pytest

from ttcfast.experiments.demo import run_demo
from ttcfast.report.outputs import shown_method
from ttcfast.report.page.methods import best_reward

pytestmark = pytest.mark.usefixtures("figures_undrawn")


def test_the_table_has_the_classical_solver_on_two_grids_and_its_mean_with_the_surrogate(tmp_path):
    result = run_demo(tmp_path, system="kolmogorov", problems=2, steps=4, branching_factor=2, beam_width=1, quiet=True)
    held = json.loads((tmp_path / "metrics.json").read_text())
    names = [row["method"] for row in held["methods"]]
    assert {"solver 16x16", "solver 32x32"} <= set(names) and {"deterministic", "mean", "arm", "oracle"} <= set(names)
    assert names[0] == "persistence" and names.index("oracle") > names.index("surrogate_solver") > names.index("arm")
    surrogate, coarse, both = (result.evaluation.find(name) for name in ("deterministic", "solver 32x32", "surrogate_solver"))
    assert surrogate is not None and coarse is not None and both is not None
    assert surrogate.mse_at(1) < coarse.mse_at(1) and both.mse_at(4) < coarse.mse_at(4)
    assert surrogate.mse_at(4) < 0.5 * float(result.evaluation.persistence[:, 4].mean())
    assert set(coarse.drift) == {"vorticity"}
    shown = shown_method(result.evaluation)
    assert shown is not None and shown.method == "prm_symmetry" and best_reward(held["methods"])["method"] == "prm_symmetry"
    assert not any("fine-tuned" in note for note in result.evaluation.notes)


def test_an_unknown_system_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="system is 'burgers'; it must be one of 'euler', 'kolmogorov'"):
        run_demo(tmp_path, system="burgers")
