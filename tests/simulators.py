"""What tests need that run a simulator."""

from importlib.util import find_spec

import pytest

needs_dm_control = pytest.mark.skipif(
    find_spec("dm_control") is None, reason="dm_control is not installed; pip install 'ttcfast[dmc]' brings it (Python 3.10 to 3.12)"
)
