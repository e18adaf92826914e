"""What every test runs under: seeded, with uninitialised memory full of NaN, on backends that must be there when asked for."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from ttcfast.ops import registry

settings.register_profile("ttcfast", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("ttcfast")

BACKENDS = ("reference", "cpu", "triton")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backends",
        default="",
        metavar="NAMES",
        help="comma-separated: reference, cpu, cuda, triton (on a GPU), triton-interpret; a test that would skip "
        "for want of one fails instead",
    )
    parser.addoption("--require-chromium", action="store_true", help="without Chromium the tests of the HTML page fail instead of skip")
    parser.addoption("--screenshots", metavar="FOLDER", help="keep the screenshots of the HTML page there, to be looked at")


def pytest_sessionstart(session: pytest.Session) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of a process that a shell starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in _required(session.config):
        if name not in (*BACKENDS, "cuda", "triton-interpret"):
            raise pytest.UsageError(f"--require-backends names {name!r}; known: {', '.join(BACKENDS)}, cuda, triton-interpret")
        if name.startswith("triton") and registry.interpreting() != (name == "triton-interpret"):
            raise pytest.UsageError(
                f"--require-backends names {name!r}, but TRITON_INTERPRET is {'on' if registry.interpreting() else 'off'}"
            )


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of ``arm`` in turn; one that cannot run here skips the test, or fails it under ``--require-backends``."""
    name: str = request.param
    reason = next(b for b in registry.OPS["arm"] if b.name == name).available()
    if reason is not None:
        label = "triton-interpret" if name == "triton" and registry.interpreting() else name
        (pytest.fail if label in _required(request.config) else pytest.skip)(f"{name}: {reason}")
    return name


@pytest.fixture
def device(backend: str) -> str:
    """Where the backend's tensors live."""
    return "cuda" if backend == "triton" and not registry.interpreting() else "cpu"


@pytest.fixture(autouse=True)
def seeded_and_filled() -> Iterator[None]:
    """Seeds torch, and fills ``torch.empty`` with NaN so that a value that nobody wrote is seen."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _required(config: pytest.Config) -> list[str]:
    return [name.strip() for name in config.getoption("--require-backends").split(",") if name.strip()]


@pytest.fixture
def in_time():
    """Fails a test that waits for a named pipe."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for a named pipe"))
    signal.alarm(10)
    yield
    signal.alarm(0)


@pytest.fixture
def figures_undrawn() -> Iterator[None]:
    """Figures are files without a drawing."""
    from tests.small_run import undrawn

    with undrawn():
        yield
