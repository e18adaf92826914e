import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("asked", "backend"), [("module://nowhere.to_be_found", None), ("no such backend", None), ("svg", "svg"), (None, None)]
)
@pytest.mark.parametrize("door", ["import ttcfast.report.outputs", "from ttcfast.report.figures import save"])
def test_a_backend_that_is_not_here_stops_nothing(asked, backend, door):
    code = f"{door}\nimport os, matplotlib\nprint(os.environ.get('MPLBACKEND'), matplotlib.get_backend(auto_select=False), sep='|')"
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | ({"MPLBACKEND": asked} if asked else {})
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    kept, found = run.stdout.strip().split("|")
    assert kept == str(asked)
    assert backend is None or found == backend
