"""What a run says it was made with, and of."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import pytest

from rlpost import __version__
from rlpost.config import DatasetData
from rlpost.data.prompts import Prompts
from rlpost.provenance import code, environment
from rlpost.stages import _told
from rlpost.types import Prompt


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", *identity, "-C", str(directory), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_is_named_by_its_commit_and_an_installed_package_is_not(tmp_path: Path) -> None:
    """A package that is installed into somebody else's repository, untracked, has no commit of its own."""
    package = tmp_path / "rlpost"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert code(package) == {"version": __version__, "commit": None, "dirty": None}
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "a")
    assert code(package)["commit"] is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "b")
    assert code(package) == {"version": __version__, "commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("changed")
    assert code(package)["dirty"] is True


def test_the_environment_names_what_is_installed_and_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'NVIDIA H100\\nNVIDIA H100\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["gpus"] == ["NVIDIA H100", "NVIDIA H100"]
    assert found["cores"] >= 1 and found["cpu"]
    tool.write_text("#!/bin/sh\nexit 3\n")
    (gpus,) = environment()["gpus"]
    assert gpus.startswith("unknown: ") and "3" in gpus


def test_data_is_told_with_its_card_and_a_fingerprint_of_what_was_read(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"rows": 2}))
    path = tmp_path / "data.parquet"
    path.touch()
    config = DatasetData(source="dataset", path=str(path), prompt="{q}", answer="a", task="math")
    prompts = [Prompt(id=name, token_ids=(1,), task="math", reference={"answer": "1"}) for name in "ab"]
    told = _told(config, Prompts.listed(prompts, {"prompt_too_long": 3}))
    fingerprint = told.pop("fingerprint")
    assert told == {"path": str(path), "num_prompts": 2, "left_out": {"prompt_too_long": 3}, "card": {"rows": 2}}
    assert fingerprint != _told(config, Prompts.listed(prompts[:1]))["fingerprint"]
    assert fingerprint == _told(config, Prompts.listed(prompts))["fingerprint"]
    (tmp_path / "card.json").unlink()
    assert "card" not in _told(config, Prompts.listed(prompts))
