"""What a run was made with: the code, and the environment of the driver. Initializes no device."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from rlpost import __version__
from rlpost.doctor import GIB, TESTED, cgroup_cores, installed_version

PACKAGE = Path(__file__).parent


def code(package: Path = PACKAGE) -> dict[str, Any]:
    """rlpost's version; from a checkout also its commit, and whether tracked files differ from it."""
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    return {
        "version": __version__,
        "commit": _git(package, "rev-parse", "HEAD") if tracked else None,
        "dirty": bool(_git(package, "status", "--porcelain", "--untracked-files=no")) if tracked else None,
    }


def environment() -> dict[str, Any]:
    """Versions, processor, GPUs and memory of this machine; on a cluster only the driver's, the nodes are in `events.jsonl`."""
    import psutil

    installed = {package: installed_version(package) for package in TESTED}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: found[1] for package, found in installed.items() if found is not None},
        "cpu": _cpu(),
        "cores": min(len(os.sched_getaffinity(0)), cgroup_cores() or os.cpu_count() or 1),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": gpu_names(),
    }


def gpu_names() -> list[str]:
    """From the driver's own tool, as it names them; none without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        return [f"unknown: {error}"]
    return result.stdout.strip().splitlines()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints about `directory`; None where it has nothing to say, or is not there."""
    git = shutil.which("git")
    if git is None:
        return None
    result = subprocess.run([git, "-C", str(directory), *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
