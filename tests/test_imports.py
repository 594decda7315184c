"""Who may import whom (ARCHITECTURE.md), and what importing must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "types": set(),
    "core": {"types"},
    "config": {"data"},
    "pipeline": {"types", "core"},
    "engines": {"types", "core", "data"},
    "data": {"types", "config"},
    "curation": {"config", "data", "recipe"},
    "tracking": {"progress", "mirror"},
    "mirror": {"tracking"},
    "progress": set(),
    "checkpoint": {"pipeline"},
    "archive": {"types", "core", "engines", "checkpoint", "tracking"},
    "analysis": {"types", "archive", "core", "engines", "tracking"},
    "memory": set(),
    "plan": {"config", "engines", "memory"},
    "recipe": {"config"},
    "exit_codes": set(),
    "study": {"analysis", "checkpoint", "config", "core", "exit_codes", "recipe", "run_directory", "tracking"},
    "summary": {"analysis", "core", "tracking"},
    "doctor": {"tracking"},
    "provenance": {"doctor"},
    "workers": {"types", "core", "config", "pipeline", "engines"},
    "evaluate": {"types", "archive", "config", "eval_report", "exit_codes", "pipeline", "plan", "progress", "run", "run_directory", "stages", "tracking", "workers"},
    "eval_report": {"core"},
    "cli": {"config", "recipe", "exit_codes", "plan", "run", "summary", "doctor", "archive", "analysis", "study", "evaluate", "curation"},
    "run_directory": {"config", "checkpoint", "engines", "pipeline", "tracking"},
    "stages": {"types", "core", "config", "data", "engines", "pipeline", "checkpoint"},
    "run": {"analysis", "archive", "config", "exit_codes", "data", "pipeline", "workers", "tracking", "checkpoint", "plan", "provenance", "run_directory", "stages", "summary"},
}  # fmt: skip
ONLY_IN = {
    "vllm": "rlpost/engines/vllm_",
    "deepspeed": "rlpost/engines/deepspeed_learner.py",
    "peft": "rlpost/engines/lora.py",
    "wandb": "rlpost/mirror.py",
    "ray": "rlpost/workers/",
    "matplotlib": "rlpost/analysis/",
    "jinja2": "rlpost/analysis/report.py",
    "pyarrow": "/output.py",
}
MODULES = sorted(p for package in ("rlpost", "reward") for p in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, wherever in the file, type-checking blocks included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unit(path: Path) -> str:
    relative = path.relative_to(ROOT / "rlpost")
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    imported = imports(path)
    if path.is_relative_to(ROOT / "reward"):
        assert not {name for name in imported if name.split(".")[0] in ("rlpost", "torch")}
        return
    if unit(path) == "__init__":
        return
    units = {name.split(".")[1] for name in imported if name.startswith("rlpost.")} - {unit(path), "__version__"}
    assert units <= ALLOWED[unit(path)], f"{path.name} may not import {units - ALLOWED[unit(path)]}"


@pytest.mark.parametrize(("package", "home"), ONLY_IN.items())
def test_each_heavy_library_has_one_home(package: str, home: str) -> None:
    users = [p for p in MODULES if any(name.split(".")[0] == package for name in imports(p))]
    strangers = [str(p.relative_to(ROOT)) for p in users if home not in str(p)]
    allowed = {"ray": ["rlpost/doctor.py"], "wandb": ["rlpost/doctor.py"]}
    assert set(strangers) <= set(allowed.get(package, ()))


@pytest.mark.parametrize(
    "module", ["rlpost.config", "rlpost.cli", "rlpost.pipeline.controller", "rlpost.core.losses", "reward"]
)
def test_importing_brings_in_no_engine(module: str) -> None:
    heavy = ["vllm", "deepspeed", "peft", "ray", "wandb", "transformers", "datasets", "matplotlib"]
    if module in ("rlpost.config", "rlpost.cli", "reward"):
        heavy.append("torch")
    code = (
        f"import sys, {module}; found = sorted(set({heavy}) & set(sys.modules)); sys.exit(str(found) if found else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_everything_leaves_cuda_alone() -> None:
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES if p.is_relative_to(ROOT / "rlpost")]
    names = [
        n for n in names if not n.endswith(("__init__", "__main__", "deepspeed_learner", "ray_workers", "processes"))
    ]
    code = (
        f"import importlib, torch\nfor n in {names}: importlib.import_module(n)\nassert not torch.cuda.is_initialized()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
