"""One surrogate, several threads; and a model that is as it was whatever ends a call."""

import copy
import gc
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.core.test_candidate_forward import Encoder, Residual, vit
from tests.surrogates import DropNet, euler_state
from ttcfast.core.base_fm import BaseFM, Surrogate
from ttcfast.core.seeds import temp_seed
from ttcfast.spec import StateSpec, StochasticConfig, TTCConfig
from ttcfast.stochastic_sampling import Draw, keyed_noise, latent_noise, mc_dropout, noise_sites
from ttcfast.ttc.inference import TTCGreedy

SPEC = StateSpec.euler2d()


def first_cell(x: Tensor, candidates: Tensor) -> Tensor:
    return candidates[..., 0, 0, 0]


def draw(fm: Surrogate, x: Tensor, seed: int = 0) -> Tensor:
    return fm.candidates(x, torch.arange(1, 5), seed=seed, step=1)


def state_of(model: nn.Module) -> list:
    """All that a call might leave behind."""
    names = ("training", "p", "drop_prob", "dropout")
    hooks = [[id(h) for h in m._forward_hooks.values()] + [id(h) for h in m._forward_pre_hooks.values()] for m in model.modules()]
    own = [([getattr(m, n, None) for n in names], list(vars(m)), vars(m).get("forward")) for m in model.modules()]
    streams = [torch.get_rng_state().tolist(), random.getstate()]
    flags = (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
    return [hooks, own, streams, flags, signal.getsignal(signal.SIGINT), len(torch.overrides._get_current_function_mode_stack())]


class OwnDraws(DropNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * torch.rand(()) * random.random()


def around_one_part() -> list[Surrogate]:
    """Two models that know nothing of each other but have a module in common."""
    torch.manual_seed(0)
    part = DropNet()
    return [
        Surrogate(nn.Sequential(part, nn.Conv2d(4, 4, 1)), SPEC),
        Surrogate(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.2), part), SPEC),
    ]


def variants() -> list[Surrogate]:
    torch.manual_seed(0)
    fm = Surrogate(Residual().eval(), SPEC)
    return [fm, fm.variant(stochastic={"latent_sigma": 0.1}), fm.variant(stochastic={"dropout_p": 0.5})]


def one(make: Callable[[], nn.Module], **options) -> list[Surrogate]:
    torch.manual_seed(0)
    return [Surrogate(make().eval(), SPEC, **options)]


CASES = {
    "one": lambda: one(DropNet),
    "attention": lambda: one(Encoder),
    "bfloat16": lambda: one(DropNet, dtype=torch.bfloat16),
    "own draws": lambda: one(OwnDraws),
    "variants": variants,
    "a shared part": around_one_part,
}


@pytest.mark.filterwarnings("ignore:the candidates of OwnDraws depend")
@pytest.mark.parametrize("case", CASES)
def test_eight_threads_get_what_they_would_get_alone(case):
    surrogates, x0 = CASES[case](), euler_state(2)
    before = [state_of(fm.model) for fm in surrogates]

    def rollout(i: int) -> Tensor:
        fm = surrogates[i % len(surrogates)]
        keyed = case != "own draws"  # whose deterministic step draws from the streams as they are
        controller = TTCGreedy(fm, first_cell, TTCConfig(branching_factor=4, seed=i, include_deterministic=keyed))
        steps = [fm.sample_next(x0, seed=i, multi=True), *([fm.deterministic(x0)] if keyed else [])]
        return torch.cat([controller.rollout(x0, 2), *(step.unsqueeze(1) for step in steps)], 1)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(rollout, range(16), timeout=120))
    assert [state_of(fm.model) for fm in surrogates] == before
    surrogates = CASES[case]()  # which has been called by no thread
    assert all(torch.equal(rollout(i), out) for i, out in enumerate(together))


def test_a_thread_that_calls_the_model_itself_meanwhile_gets_no_noise_and_changes_nothing():
    fm, x = one(Residual)[0], euler_state(2)
    with torch.no_grad():
        clean, alone = fm.model(x), draw(fm, x)
    wrong, stop = [], threading.Event()

    def call() -> None:
        while not stop.is_set():
            with torch.no_grad():
                wrong.append(not torch.equal(fm.model(x), clean))

    thread = threading.Thread(target=call)
    thread.start()
    try:
        while len(wrong) < 3:
            time.sleep(0.001)
        assert all(torch.equal(draw(fm, x), alone) for _ in range(20))
    finally:
        stop.set()
        thread.join()
    assert not any(wrong)


@pytest.mark.parametrize("context", ["keyed", "mc", "latent", "seed"])
def test_contexts_that_users_hold_take_turns_with_calls(context):
    fm, x = one(DropNet)[0], euler_state(2)
    alone, before = draw(fm, x), state_of(fm.model)
    rows = torch.stack([torch.zeros(2, dtype=torch.int64), torch.arange(2)], 1)
    make = {
        "keyed": lambda: keyed_noise(fm.model, noise_sites(fm.model, StochasticConfig()), Draw.of(0, 0, rows)),
        "mc": lambda: mc_dropout(fm.model, 0.5, ["lift"]),
        "latent": lambda: latent_noise(fm.model, "lift", 0.1),
        "seed": lambda: temp_seed(3),
    }[context]
    results: list[Tensor] = []
    with make():
        thread = threading.Thread(target=lambda: results.append(draw(fm, x)))
        thread.start()
        time.sleep(0.05)
        assert not results
        assert draw(fm, x).shape == alone.shape  # a call within the block's own thread does not wait
    thread.join(10)
    assert torch.equal(results[0], alone) and state_of(fm.model) == before


def test_forward_waits_for_candidates_of_other_threads():
    fm, x = one(DropNet)[0], euler_state(2)
    fm.model.train()  # its forward is in training, and must not see the evaluation of another thread's candidates
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(draw, fm, x, seed) for seed in range(20)]
        outs = [fm(x).detach() for _ in range(20)]
        assert all(torch.isfinite(m.result(60)).all() for m in made)
    assert len({out.sum().item() for out in outs}) == 20
    assert all(m.training for m in fm.model.modules())


def test_samples_of_others_take_turns_under_their_seeds():
    class Noisy(BaseFM):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.001)
            return x + torch.randn_like(x)

    fm, x = Noisy(), torch.zeros(4, 3, 3)
    alone, before = [fm.sample_next(x, seed=i) for i in range(16)], torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(lambda i: fm.sample_next(x, seed=i), range(16)), alone))
    assert torch.equal(torch.get_rng_state(), before)


class Interrupted(nn.Module):
    """Does something at its n-th call, and is otherwise not there."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.act = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.act()
        return x

    def __deepcopy__(self, memo):  # copies count on: the trace runs on one
        return self


def stop() -> None:
    raise KeyboardInterrupt


def pressed() -> None:
    signal.raise_signal(signal.SIGINT)


def interrupted_model() -> tuple[Surrogate, Interrupted]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), i := Interrupted(), Encoder(), nn.Dropout(0.3), nn.Conv2d(4, 4, 1)).eval()
    model[2].eval()
    return Surrogate(model, SPEC, stochastic={"dropout_p": 0.2, "dropout_after": ("0",), "latent_at": "2", "latent_sigma": 0.1}), i


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("act", [stop, pressed])
def test_the_model_is_as_it_was_when_its_forward_is_interrupted(act, dtype):
    fm, i = interrupted_model()
    fm, x = fm.variant(dtype=dtype), euler_state(2)
    fm.model[3].train()
    expected = draw(copy.deepcopy(fm), x)
    before = state_of(fm.model)
    reached = 0
    for call in range(1, 40):
        fm = fm.variant()  # which has found out nothing yet: the trace is interrupted as well
        fm.model[3].train()
        i.left, i.act = call, act
        try:
            draw(fm, x)
            break
        except KeyboardInterrupt:
            reached += 1
        assert state_of(fm.model) == before
        i.left = 0
        assert torch.equal(draw(fm, x), expected)
    assert reached == (5 if dtype is None else 7)  # four forwards of the trace, the call itself, and two that correct it in low precision


@pytest.mark.parametrize("act", [stop, pressed])
def test_or_a_hook(act):
    fm, x = one(Residual)[0], euler_state(2)
    expected, armed = draw(fm, x), [False]
    fm.model.head.register_forward_hook(lambda module, inputs, output: act() if armed[0] else None)
    before, armed[0] = state_of(fm.model), True
    for call in (lambda: draw(fm, x), lambda: fm.deterministic(x), lambda: fm.sample_next(x, seed=0, multi=True)):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert state_of(fm.model) == before
    armed[0] = False
    assert torch.equal(draw(fm, x), expected) and state_of(fm.model) == before


@pytest.mark.parametrize("act", [stop, pressed])
def test_or_the_entering_and_leaving_of_the_noise(act, monkeypatch):
    fm, _ = interrupted_model()
    x = euler_state(2)
    expected, before = draw(fm, x), state_of(fm.model)
    register = nn.Module.register_forward_hook
    for nth in range(1, 30):
        seen = []

        def counted(module, hook, nth=nth, seen=seen, **options):
            seen.append(1)
            handle = register(module, hook, **options)
            if len(seen) == nth:
                if act is stop:
                    handle.remove()  # as if it had been raised before
                act()
            return handle

        monkeypatch.setattr(nn.Module, "register_forward_hook", counted)
        try:
            draw(fm, x)
            assert len(seen) < nth
            break
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.undo()
        assert state_of(fm.model) == before
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), mc_dropout(fm.model, 0.4, ["0", "4"]):
            patch.setattr(nn.Module, "register_forward_hook", counted)
            raise KeyboardInterrupt
        assert state_of(fm.model) == before
    assert nth > 5 and torch.equal(draw(fm, x), expected)


def test_mc_dropout_is_undone_when_its_entering_is_interrupted(monkeypatch):
    model = Residual().eval()
    before, register = state_of(model), nn.Module.register_forward_hook

    def second(module, hook, **options):
        if any(len(m._forward_hooks) for m in model.modules()):
            raise KeyboardInterrupt
        return register(module, hook, **options)

    monkeypatch.setattr(nn.Module, "register_forward_hook", second)
    with pytest.raises(KeyboardInterrupt), mc_dropout(model, 0.4, ["lift", "head"]):
        pytest.fail("it was not entered")
    assert state_of(model) == before


class Pressed:
    """While a block runs: Ctrl-C at the n-th event that Python tells a debugger of, be it a call, a line or a return."""

    def __init__(self, n: int) -> None:
        self.left, self.seen = n, 0

    def __enter__(self) -> "Pressed":
        self._before = sys.gettrace()
        sys.settrace(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _look(self, frame: FrameType, event: str, value: object) -> Callable[..., Any]:
        self.seen += 1
        if self.seen == self.left:
            sys.settrace(None)
            handler = signal.getsignal(signal.SIGINT)
            assert callable(handler)
            handler(signal.SIGINT, frame)  # what it raises comes up in that frame
        return self._look


def test_ctrl_c_at_any_moment_leaves_the_model_as_it_was():
    fm, x = Surrogate(vit().eval(), SPEC, stochastic={"latent_sigma": 0.1, "latent_at": "blocks.1"}), euler_state(1)
    expected, before = draw(fm, x), state_of(fm.model)
    gc.disable()  # what an interrupt raises within a callback of the collector is lost
    try:
        with Pressed(0) as whole:
            draw(fm, x)
        moments = range(1, whole.seen, whole.seen // 60)
        for moment in moments:
            with pytest.raises(KeyboardInterrupt), Pressed(moment):
                draw(fm, x)
            assert state_of(fm.model) == before, moment
    finally:
        gc.enable()
    assert len(moments) >= 60 and torch.equal(draw(fm, x), expected)
