import dataclasses
import json
import math

import pytest
import torch

from tests.small_run import problems, surrogate, trajectories
from ttcfast.evaluation.evaluate import evaluate_method
from ttcfast.report.recorded import read_recorded, write_recorded
from ttcfast.runtime.errors import DataError
from ttcfast.spec import TTCConfig


@pytest.fixture
def recorded(tmp_path):
    given = problems()
    result = dataclasses.replace(evaluate_method("deterministic", surrogate(), given, None, TTCConfig()), method="finetuned")
    path = tmp_path / "finetuned.json"
    write_recorded(path, [result], given, {"note": "trained on for 90 s", "seconds": 90})
    return path, result


def test_recorded_rows_come_back(recorded):
    path, result = recorded
    (back,), note = read_recorded(path, problems())
    torch.testing.assert_close(back.mse, result.mse, rtol=0, atol=0)
    torch.testing.assert_close(back.drift["mass"], result.drift["mass"], rtol=0, atol=0)
    assert (back.method, back.evaluations, back.trajectory) == ("finetuned", result.evaluations, None)
    assert back.recorded == note == "trained on for 90 s"


def test_rows_serve_for_some_of_the_problems(recorded):
    path, result = recorded
    some = dataclasses.replace(problems(), truth=trajectories()[[3, 1]], shown=())
    (back,), _ = read_recorded(path, some)
    torch.testing.assert_close(back.mse, result.mse[[3, 1]])
    assert back.evaluations == result.evaluations * 2 // 5


def test_rows_are_cut_to_shorter_rollouts(recorded):
    (back,), _ = read_recorded(recorded[0], problems(rolled=3))
    assert back.steps == 3 and back.drift["energy"].shape == (5, 4)


def test_values_that_are_not_finite_survive(tmp_path):
    given = problems()
    result = evaluate_method("deterministic", surrogate(), given, None, TTCConfig())
    broken = result.mse.clone()
    broken[0, 4:] = math.nan
    write_recorded(tmp_path / "r.json", [dataclasses.replace(result, mse=broken)], given, {"note": "x"})
    assert read_recorded(tmp_path / "r.json", given)[0][0].blown_up.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": trajectories(seed=3)}, "other problems"),
        ({"scale": torch.ones(4)}, "other units"),
        ({"truth": trajectories(steps=12), "steps": 12}, "fewer steps"),
    ],
)
def test_rows_of_something_else_are_refused(recorded, changes, message):
    with pytest.raises(DataError, match=message):
        read_recorded(recorded[0], dataclasses.replace(problems(), **changes))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"about": {}}', json.dumps({"about": {"note": ""}, "problems": "", "scale": None, "results": [{}]})]
)
def test_damaged_record_gives_one_clear_error(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match="missing or damaged"):
        read_recorded(tmp_path / "r.json", problems())
