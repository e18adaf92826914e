import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ttcfast.runtime import provenance


@dataclass
class Config:
    seed: int = 3
    out: Path = Path("runs")
    nested: dict = field(default_factory=lambda: {"noise_seed": 4, "sizes": (1, 2), "dtype": torch.float32})


def test_a_record_holds_config_seeds_versions_and_machine(tmp_path):
    entry = provenance.write(tmp_path, Config())
    assert json.loads((tmp_path / "provenance.json").read_text()) == entry
    assert entry["config"] == {"seed": 3, "out": "runs", "nested": {"noise_seed": 4, "sizes": [1, 2], "dtype": "torch.float32"}}
    assert entry["seeds"] == {"seed": 3, "nested.noise_seed": 4}
    assert entry["versions"]["torch"] == torch.__version__
    assert entry["host"]["torch_threads"] == torch.get_num_threads()


def test_the_commit_is_that_of_this_checkout_and_tells_changes(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments], check=True, capture_output=True
        )

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    monkeypatch.setattr(provenance, "_SOURCE", tmp_path.resolve())
    commit = provenance.git_commit()
    assert commit is not None and len(commit["commit"]) == 40 and commit["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert provenance.git_commit() == {**commit, "dirty": True}


def test_a_package_installed_inside_anothers_checkout_has_no_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(provenance, "_SOURCE", (tmp_path / "site-packages").resolve())
    assert provenance.git_commit() is None
