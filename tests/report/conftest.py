"""A run of the demo on small data, folders of runs, and a browser, for the tests of the page."""

import copy
import json

import pytest

from tests.report.browser import Browser, find_chromium
from tests.small_run import write_examples
from ttcfast.experiments.demo import run_demo
from ttcfast.runtime.files import write_csv, write_json
from ttcfast.runtime.logs import RunLog

HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">'&\""


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of the demo on small data, with sweep, fields and calibration."""
    folder = tmp_path_factory.mktemp("page")
    out = folder / "runs" / "demo"
    examples = write_examples(folder / "examples")
    run_demo(
        out,
        examples=examples,
        branching_factor=3,
        steps=4,
        problems=4,
        sweep=(1, 4),
        sweep_problems=2,
        quiet=True,
    )
    return out


@pytest.fixture(scope="session")
def multirun(run, tmp_path_factory):
    """Three runs of a multirun that differ in B and in where they wrote, a fourth that has not finished, and a training."""
    folder = tmp_path_factory.mktemp("multi") / "ttc.branching_factor"
    held = json.loads((run / "metrics.json").read_text())
    for i, b in enumerate((2, 3, 16)):
        changed = copy.deepcopy(held)
        changed["provenance"]["config"]["ttc"]["branching_factor"] = b
        changed["provenance"]["config"]["out"] = f"somewhere/{i}"
        write_json(folder / str(i) / "metrics.json", changed)
    write_json(folder / "3" / "run_ttc.provenance.json", {"config": {}})
    training = folder.parent / "training"
    with RunLog(training) as log:
        for step in range(1, 6):
            log.log({"loss": 1.0 / step, "note": "fine"}, step)
    write_csv(training / "table.csv", [{"arm": HOSTILE, "error": 0.25, "seeds": 3}, {"arm": "flow", "error": 0.125, "seeds": 3}])
    return folder


@pytest.fixture(scope="session")
def browser(request, tmp_path_factory):
    program = find_chromium()
    if program is None:
        reason = "no Chromium on this machine (Debian: apt-get install chromium)"
        (pytest.fail if request.config.getoption("--require-chromium") else pytest.skip)(reason)
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
