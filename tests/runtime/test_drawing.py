import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("asked", "backend", "door"),
    [
        ("module://nowhere.to_be_found", None, "import ttcfast.report.outputs"),
        ("module://nowhere.to_be_found", None, "from ttcfast.report.figures import save"),
        ("no such backend", None, "import ttcfast.report.outputs"),
        ("svg", "svg", "from ttcfast.report.figures import save"),
        (None, None, "import ttcfast.report.outputs"),
    ],
)
def test_a_backend_that_is_not_here_stops_nothing(asked, backend, door):
    code = f"{door}\nimport os, matplotlib\nprint(os.environ.get('MPLBACKEND'), matplotlib.get_backend(auto_select=False), sep='|')"
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | ({"MPLBACKEND": asked} if asked else {})
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    kept, found = run.stdout.strip().split("|")
    assert kept == str(asked)
    assert backend is None or found == backend
