import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from ttcfast.cli.commands import COMMANDS
from ttcfast.cli.configuration import CONFIGS, compose, layout_of
from ttcfast.cli.typed import build, fit
from ttcfast.experiments.demo import run_demo
from ttcfast.runtime.errors import ArgumentError


def test_the_plans_command_line_is_understood():
    keys = ["fm.ckpt=a", "use_prm=false", "prm.ckpt=b", "ttc.branching_factor=5", "stochastic.dropout=true"]
    values = compose("run_ttc", [*keys, "stochastic.latent_sigma=0.01", "stochastic.antithetic=true", "eval.rollout_T=128"])
    assert values["fm"]["ckpt"] == "a" and values["eval"]["rollout_T"] == 128
    assert values["reward"] == {"type": "arm", "prm_ckpt": "b"}
    assert values["ttc"]["branching_factor"] == 5
    assert values["ttc"]["stochastic"]["dropout"] is True and values["ttc"]["stochastic"]["latent_sigma"] == 0.01
    assert values["ttc"]["stochastic"]["antithetic"] is True


def test_the_plans_configuration_snippet_is_understood():
    keys = ["ttc.stochastic.input_eps=0.5", "reward.type=prm", "reward.prm_ckpt=/ckpts/prm.pt", "arm.w_bc=0.2"]
    values = compose("run_ttc", keys)
    assert values["reward"] == {"type": "prm", "prm_ckpt": "/ckpts/prm.pt"}
    assert values["ttc"]["stochastic"]["input_eps"] == 0.5 and values["arm"]["w_bc"] == 0.2


@pytest.mark.parametrize(
    "pair",
    [
        ("use_prm=true", "reward.type=arm"),
        ("reward.type=prm", "use_prm=false"),
        ("prm.ckpt=a", "reward.prm_ckpt=b"),
        ("stochastic.dropout=true", "ttc.stochastic.dropout=false"),
    ],
)
def test_an_alias_and_its_key_must_agree(pair):
    with pytest.raises(ArgumentError, match=f"{pair[0]} and {pair[1]} mean the same key .* and disagree"):
        compose("run_ttc", pair)


def test_an_alias_may_repeat_its_key_and_a_key_itself_takes_the_last():
    compose("run_ttc", ["stochastic.dropout=true", "ttc.stochastic.dropout=True", "use_prm=false", "reward.type=arm"])
    assert compose("generate", ["seed=1", "seed=2"])["seed"] == 2


@pytest.mark.parametrize(
    ("command", "argument", "message"),
    [
        ("generate", "frmes=3", "unknown key 'frmes'; did you mean 'frames'"),
        ("run_ttc", "ttc.branching=3", "unknown key 'ttc.branching'; did you mean 'ttc.branching_factor'"),
        ("run_ttc", "out.folder=x", "unknown key 'out.folder'"),
        ("generate", "hydra/launcher=joblib", "hydra/launcher is a key of Hydra's launchers and sweeps; add --multirun"),
        ("generate", "frames", "'frames' is not key=value"),
        ("generate", "+new=1", "is not key=value"),
        ("generate", "presets=[a", r"given: presets=\[a"),
        ("generate", "n=1,2", "Ambiguous value for argument 'n=1,2'"),
        ("info", "x=1", "takes no keys"),
    ],
)
def test_a_bad_argument_is_one_clear_error(command, argument, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        compose(command, [argument])
    assert "\n" not in str(caught.value)


def test_report_takes_folders_as_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ttc.seed=1,x=[2]").mkdir()
    words = ["a/b", "it's", "ttc.seed=1,x=[2]", "with space", "back\\"]
    assert compose("report", [*words, "out=there"]) == {"runs": words, "out": "there"}
    assert compose("report", ["runs=[a,b]"])["runs"] == ["a", "b"]
    with pytest.raises(ArgumentError, match="unknown key 'ouy'"):
        compose("report", ["a", "ouy=there"])
    with pytest.raises(ArgumentError, match="give one list"):
        compose("report", ["a", "runs=[b]"])


def test_use_prm_must_be_true_or_false():
    with pytest.raises(ArgumentError, match="use_prm is 'maybe'; it must be true or false"):
        compose("run_ttc", ["use_prm=maybe"])


def test_ranges_take_any_preset():
    ranges = compose("generate", ["ranges.gauss_vortices.strength=[1,2]", "ranges.riemann4.density=[1,3]"])["ranges"]
    assert ranges["gauss_vortices"] == {"strength": [1, 2]}
    assert ranges["riemann4"]["density"] == [1, 3] and "pressure" in ranges["riemann4"]


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    n: int
    names: tuple[str, ...] = ()
    place: Path | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)
    either: Inner | Mapping[str, object] | None = None
    flag: bool = False

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"n is {self.n}; it must be at least 1")


def test_a_dataclass_is_built_with_its_types():
    built = build(Outer, {"n": 3, "names": ["a"], "place": "x", "inner": {"rate": 1}, "either": {"rate": 2}, "flag": True})
    assert built == Outer(3, ("a",), Path("x"), Inner(1.0), Inner(2.0), True)
    assert isinstance(built.inner.rate, float)
    assert build(Outer, {"n": 1, "either": None}).either is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": "abc"}, "n is 'abc'; expected a whole number"),
        ({"n": 2.5}, "n is 2.5; expected a whole number"),
        ({"n": True}, "n is True; expected a whole number"),
        ({"n": "???"}, "n is not given; add n=..."),
        ({"n": 0}, "n is 0; it must be at least 1"),
        ({"n": 1, "names": "a"}, r"names is 'a'; expected a list \[a,b\]"),
        ({"n": 1, "names": [1]}, r"names\[0\] is 1; expected text"),
        ({"n": 1, "inner": {"rate": "x"}}, "inner.rate is 'x'; expected a number"),
        ({"n": 1, "inner": {"speed": 1}}, "unknown key 'inner.speed'"),
        ({"n": 1, "flag": 1}, "flag is 1; expected true or false"),
        ({"n": 1, "place": 4}, "place is 4; expected a path"),
    ],
)
def test_a_value_of_another_type_names_its_key(values, message):
    with pytest.raises(ArgumentError, match=message):
        build(Outer, values)


def test_a_field_is_called_by_the_users_name():
    with pytest.raises(ArgumentError, match=r"eval\.count is 0; it must"):
        build(Outer, {"n": 0}, names={"n": "eval.count"})


CHANGED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
DATACLASSES = sorted(set(COMMANDS) - {"info", "bench"})  # bench has keys of its own


def leaves(node: Mapping, prefix: str = "") -> dict[str, object]:
    """Values by dotted key."""
    found: dict[str, object] = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return found


@pytest.mark.parametrize("command", sorted(set(CHANGED) - {"bench"}))
def test_a_configuration_file_holds_what_the_command_changes_and_nothing_else(command):
    """A key of a file stands in the dataclass, with another default there: a default is written once."""
    written = yaml.safe_load((CONFIGS / f"{command}.yaml").read_text())
    assert written.pop("defaults")[0] == f"{command}_defaults"
    known = leaves(layout_of(command).defaults())
    free = ("alg", *layout_of(command).free)  # a group of files, and keys of the user's own
    for key, value in leaves(written).items():
        if key.partition(".")[0] not in free:
            assert key in known, f"{command}.yaml: {key} is no key"
            assert known[key] != value, f"{command}.yaml: {key} repeats the default"


def test_a_size_of_a_world_model_changes_what_all_share():
    shared = leaves(yaml.safe_load((CONFIGS / "alg/parts/pwm.yaml").read_text()))
    for path in (CONFIGS / "alg").glob("*.yaml"):
        written = yaml.safe_load(path.read_text())
        del written["defaults"]
        assert not [key for key, value in leaves(written).items() if key in shared and shared[key] == value], path


@pytest.mark.parametrize("command", sorted(set(DATACLASSES) - set(CHANGED)))
def test_a_command_without_a_file_has_the_defaults_of_its_dataclass(command):
    assert compose(command, []) == layout_of(command).defaults()


def test_what_the_commands_change():
    """The values of the command lines; where a library call has others, the file of the command says why."""
    run = compose("run_ttc", [])
    assert run["ttc"]["stochastic"]["latent_sigma"] == 0.01 and run["data"]["split"] == "test" and run["out"] == "runs/run_ttc"
    assert (run["arm"]["momentum"], run["arm"]["scale"]) == ("components", "relative")
    assert compose("train_prm_on_policy", [])["model"] == {"width": [32, 48, 64, 64], "depth": 1, "levels": 4, "patch": 2, "residual": True}
    assert compose("build_prm_data", [])["stochastic"]["latent_sigma"] == 0.01


@pytest.mark.parametrize("command", sorted(set(DATACLASSES) - {"demo"}))
def test_every_configuration_builds_its_dataclass(command):
    given = {"run_ttc": ["fm.ckpt=x"], "train_prm_on_policy": ["fm=x"]}.get(command, [])
    layout, values = layout_of(command), compose(command, given)
    if command == "ceiling":
        values["sources"] = {"a": {"dropout": True}}
    assert isinstance(layout.build(values), layout.source)


def test_the_demos_configuration_fits_its_function():
    fit(run_demo, compose("demo", []))


def test_data_may_be_a_path_or_a_list_of_paths():
    layout = layout_of("ceiling")
    for text, wanted in (("a b", ("a b",)), ("[a,b]", ("a", "b"))):
        assert layout.build(compose("ceiling", [f"data.root={text}"]) | {"sources": {"a": {}}}).data == wanted


@pytest.mark.parametrize("name", ["20240101", "1e3", "true", "a b", "it's", "a,b", "x=1/y", "(a)", "back\\", "#1", "[x"[1:]])
def test_a_path_is_taken_as_it_stands(name):
    assert compose("generate", [f"out={name}"])["out"] == name


def test_the_home_folder_and_no_folder_at_all(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert compose("run_ttc", ["out=~/x", "fm.ckpt=~/y"])["out"] == "/home/me/x"
    for text in ("out=", "out=''", "fm.ckpt=", "data.root="):
        with pytest.raises(ArgumentError, match="is empty; give a path"):
            compose("run_ttc", [text])
    with pytest.raises(ArgumentError, match="NUL byte"):
        compose("run_ttc", ["out=a\0b"])
