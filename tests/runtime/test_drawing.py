"""Matplotlib's backend is the user's choice, and one that is not here stops nothing."""

import json
import os
import subprocess
import sys

import pytest

CASES = [  # what MPLBACKEND asks for, the backend that it must become, by which import
    ("module://nowhere.to_be_found", None, "import ttcfast.report.outputs"),
    ("module://nowhere.to_be_found", None, "from ttcfast.report.figures import save"),
    ("no such backend", None, "import ttcfast.report.outputs"),
    ("svg", "svg", "from ttcfast.report.figures import save"),
    (None, None, "import ttcfast.report.outputs"),
]
# Each case in a child of its own, which finds torch imported but nothing that draws.
CHILDREN = """
import json, os, sys
import torch
for asked, door in json.loads(sys.argv[1]):
    assert "matplotlib" not in sys.modules
    reading, writing = os.pipe()
    if not os.fork():
        if asked:
            os.environ["MPLBACKEND"] = asked
        exec(door)
        import matplotlib
        found = os.environ.get("MPLBACKEND"), matplotlib.get_backend(auto_select=False)
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    print(open(reading).read(), os.waitstatus_to_exitcode(os.wait()[1]), sep="|", flush=True)
"""


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    asked = json.dumps([(asked, door) for asked, _, door in CASES])
    run = subprocess.run([sys.executable, "-c", CHILDREN, asked], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines(), run.stderr


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{CASES[i][2]}")
def test_a_backend_that_is_not_here_stops_nothing(found, case):
    said, status = found[0][case].rsplit("|", 1)
    assert status == "0", found[1]
    kept, backend = json.loads(said)
    asked, wanted, _ = CASES[case]
    assert kept == asked
    assert wanted is None or backend == wanted
