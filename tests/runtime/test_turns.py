"""Turns: one thread at a time, and interrupts that wait while something is put back."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from ttcfast.runtime import turns
from ttcfast.runtime.turns import in_turn, interruptible, turn


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handler_comes_back():
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) == before
    assert turns._held.owner is None and turns._held.lock.acquire(blocking=False)
    turns._held.lock.release()


def test_one_thread_at_a_time_and_again_within_its_own_turn():
    inside, most = [], []

    @in_turn
    def work() -> None:
        with turn("again"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    work()
    for t in threads:
        t.join()
    assert most == [1] * 9


def test_an_interrupt_waits_for_the_end_of_a_turn():
    steps = []
    with pytest.raises(KeyboardInterrupt), turn("edit"):
        interrupt()
        steps.append("edited")
        with turn("within"):
            interrupt()
        steps.append("put back")
    assert steps == ["edited", "put back"]


def test_it_acts_at_once_where_that_is_allowed_and_never_in_what_puts_things_back():
    steps = []
    with pytest.raises(KeyboardInterrupt), turn("edit"):
        try:
            with interruptible():
                interrupt()
                steps.append("not reached")
        finally:
            steps.append("putting back")
            with turn("more"):
                interrupt()  # the second one waits
            steps.append("put back")
    assert steps == ["putting back", "put back"]
    with pytest.raises(KeyboardInterrupt), turn("edit"):
        interrupt()
        with interruptible():  # one that waited acts here
            steps.append("not reached")
    assert "not reached" not in steps


def test_a_turn_within_an_interruptible_block_waits_and_the_block_goes_on_being_interruptible():
    steps = []
    with pytest.raises(KeyboardInterrupt), turn("outer"), interruptible():
        with turn("inner"):
            interrupt()
            steps.append("inner")
        steps.append("not reached")
    with pytest.raises(KeyboardInterrupt), turn("outer"), interruptible():
        with turn("inner"):
            pass
        interrupt()
        steps.append("not reached")
    assert steps == ["inner"]


def test_a_handler_that_raises_nothing_is_called_too():
    calls = []
    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        with turn("edit"):
            interrupt()
            assert calls == []
            with interruptible():
                assert calls == [signal.SIGINT]
                interrupt()
                assert len(calls) == 2
                interrupt()
                assert len(calls) == 3
        assert len(calls) == 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_exceptions_release_the_lock():
    with pytest.raises(ValueError, match="no"), turn("edit"):
        raise ValueError("no")


def held_elsewhere(until: threading.Event) -> threading.Thread:
    there = threading.Event()

    def hold() -> None:
        with turn("a long call"):
            there.set()
            until.wait(10)

    thread = threading.Thread(target=hold, name="the other")
    thread.start()
    there.wait(10)
    return thread


class Busy:
    """A lock that somebody else has, for so many attempts to get it; each is preceded by something."""

    def __init__(self, attempts: int, first=lambda: None) -> None:
        self.attempts, self.first, self.held = attempts, first, False

    def acquire(self, timeout: float) -> bool:
        self.first()
        self.attempts -= 1
        self.held = self.attempts < 0
        return self.held

    def release(self) -> None:
        self.held = False


def test_waiting_can_be_interrupted_and_takes_nothing(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(turns._held, "lock", busy := Busy(3, interrupt))
        with pytest.raises(KeyboardInterrupt), turn("wait"):
            pytest.fail("the other thread has its turn")
    assert busy.attempts == 2 and not busy.held


@pytest.mark.parametrize("attempts", [1, 2, 3, 9])
def test_a_long_wait_says_for_whom(monkeypatch, caplog, attempts):
    monkeypatch.setattr(turns, "_PATIENCE", 2 * turns._POLL)
    with monkeypatch.context() as patch:
        patch.setattr(turns._held, "lock", busy := Busy(attempts))
        patch.setattr(turns._held, "what", "a long call in thread 'the other'")
        with turn("candidates"):
            assert busy.held
    told = "candidates has waited 0 s for a long call in thread 'the other', since only one"
    assert caplog.text.count(told) == (attempts > 1) and not busy.held


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_turn_that_another_thread_ends_is_over(interrupted):
    def held():
        with turn("a generator") as this, this.body():
            yield

    generator = held()
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    others: list[bool] = []
    thread = threading.Thread(target=lambda: others.append(turns._held.lock.acquire(timeout=10)))
    thread.start()
    thread.join()
    assert others == [True]
    turns._held.lock.release()
    if interrupted:  # nobody is in a turn, so it acts at once
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    test_an_interrupt_waits_for_the_end_of_a_turn()  # which puts back what the thread could not


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("own", [False, True])
def test_a_child_does_not_wait_for_a_thread_that_it_does_not_have(own):
    until = threading.Event()
    thread = None if own else held_elsewhere(until)

    def take_a_turn() -> bool:
        with turn("in the child"):
            return True

    with turn("own") if own else interruptible(False):
        ended = child(take_a_turn)
    until.set()
    if thread is not None:
        thread.join()
    assert ended == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_of_another_thread_can_be_interrupted_though_the_main_thread_had_its_turn():
    handler, ended = signal.getsignal(signal.SIGINT), []

    def interrupted() -> bool:
        at_once = False
        try:
            interrupt()
        except KeyboardInterrupt:
            at_once = signal.getsignal(signal.SIGINT) == handler
        try:
            with turn("in the child"):
                interrupt()
        except KeyboardInterrupt:
            return at_once
        return False

    with turn("in the parent"):
        thread = threading.Thread(target=lambda: ended.append(child(interrupted)))
        thread.start()
        thread.join()
    assert ended == [0]


def child(work: Callable[[], bool]) -> int | None:
    """Status of a forked process, 0 if what it does is true; None if it had to be killed."""
    if (process := os.fork()) == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 10
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return None
    return os.waitstatus_to_exitcode(ended[1])
