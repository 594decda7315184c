"""Isolation by name: what a machine offers, what is refused, and that every tier judges alike, as root and as anybody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reward import Outcome, RewardPool, TaskLimits, sandbox
from reward.sandbox import TIERS, Tier, TierError, choose_tier
from tests.reward.attacks import EXPLOITS, SLOW_EXPLOITS
from tests.reward.test_exploits import JUDGED, REFERENCE, response

ROOT = Path(__file__).parents[2]
ANYBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
READS_THE_HOST = ("reads the host", "reads the process table", "loads the harness", "looks for the tests")


def test_tiers_have_names_and_an_order() -> None:
    assert [str(tier) for tier in TIERS] == ["namespace", "landlock", "rlimits-only"]


def offers(monkeypatch: pytest.MonkeyPatch, tier: Tier) -> None:
    monkeypatch.setattr(sandbox, "probe", lambda: tier)
    monkeypatch.setattr(sandbox, "why_not", lambda tier: f"no {tier} here")


@pytest.mark.parametrize("least", [Tier.NAMESPACE, Tier.LANDLOCK])
@pytest.mark.parametrize("offered", TIERS)
def test_a_machine_that_offers_less_than_the_least_tier_is_refused(
    monkeypatch: pytest.MonkeyPatch, offered: Tier, least: Tier
) -> None:
    offers(monkeypatch, offered)
    if TIERS.index(offered) <= TIERS.index(least):
        assert choose_tier(least) is offered
        return
    with pytest.raises(TierError, match=f"tier {least} or stronger.*offers {offered}.*namespace: no namespace here"):
        RewardPool(min_tier=least)
    assert choose_tier(least, unsafe_allow_rlimits_only=True) is offered


def test_the_weakest_tier_cannot_be_asked_for_without_the_unsafe_flag() -> None:
    with pytest.raises(ValueError, match="unsafe"):
        choose_tier(Tier.RLIMITS_ONLY)


@pytest.fixture(scope="module", params=TIERS[1:], ids=str)
def weaker_pool(request: pytest.FixtureRequest) -> Iterator[RewardPool]:
    tier: Tier = request.param
    reason = sandbox.why_not(tier)
    if reason is not None:
        pytest.skip(f"this machine has no tier {tier}: {reason}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "probe", lambda: tier)
        with RewardPool(code=TaskLimits(deadline_s=10.0), unsafe_allow_rlimits_only=True) as pool:
            yield pool


def leftovers(pool: RewardPool) -> list[str]:
    folders = [server._tmp for worker in pool._code for server in (worker._candidate, worker._judge)]
    return [f"{folder}/{name}" for folder in folders if folder is not None for name in os.listdir(folder)]


def test_weaker_tiers_judge_alike(weaker_pool: RewardPool) -> None:
    right = "import os\ndef f(x):\n    open('scratch', 'w').write('x')\n    return 48271 if x == 2 else 16807"
    for reference in (REFERENCE, JUDGED):
        verdict = weaker_pool.score("code", response(right), reference)
        assert (verdict.outcome, verdict.tier) == (Outcome.CORRECT, weaker_pool.tier), verdict.detail
    script = {"tests": [{"input": "2 3", "output": "5"}]}
    adds = "print(sum(map(int, open(0).read().split())))"
    assert weaker_pool.score("code", response(adds), script).outcome is Outcome.CORRECT
    assert weaker_pool.score("math", r"\boxed{\sqrt{12}}", {"answer": r"2\sqrt{3}"}).outcome is Outcome.CORRECT
    assert leftovers(weaker_pool) == []


@pytest.mark.parametrize("name", EXPLOITS)
def test_exploits_earn_nothing_in_weaker_tiers_either(weaker_pool: RewardPool, name: str) -> None:
    if weaker_pool.tier is Tier.RLIMITS_ONLY and name in READS_THE_HOST:
        return  # this tier is called unsafe for it
    verdict = weaker_pool.score("code", response(EXPLOITS[name]), REFERENCE)
    assert (verdict.reward, verdict.outcome) == (0.0, Outcome.WRONG), verdict.detail
    assert leftovers(weaker_pool) == []


def test_landlock_opens_nothing_outside_and_changes_nothing(weaker_pool: RewardPool, tmp_path: Path) -> None:
    if weaker_pool.tier is not Tier.LANDLOCK:
        return
    tmp_path.chmod(0o777)
    target = tmp_path / "host"
    target.write_text("48271")
    target.chmod(0o666)
    attempts = (
        f"open({str(target)!r}).read()",
        f"open({str(target)!r}, 'w').write('x')",
        f"__import__('os').truncate({str(target)!r}, 0)",
        f"__import__('os').unlink({str(target)!r})",
        f"__import__('os').listdir({str(tmp_path)!r})",
        f"__import__('os').mkdir({str(tmp_path / 'made')!r})",
        f"__import__('os').link({str(target)!r}, 'linked')",
        f"(__import__('os').symlink({str(target)!r}, 'way'), open('way').read())",
        "open('/proc/1/stat').read()",
        "open('/etc/passwd').read()",
    )
    program = (
        f"def f(x):\n    done = []\n    for attempt in {attempts!r}:\n        try: done.append(str(eval(attempt)))\n"
    )
    program += "        except OSError: pass\n    return done"
    verdict = weaker_pool.score("code", response(program), {"tests": ["assert f(0) == []"]})
    assert verdict.outcome is Outcome.CORRECT, verdict.detail
    assert target.read_text() == "48271" and [path.name for path in tmp_path.iterdir()] == ["host"]


def test_without_a_tmpfs_the_disk_is_still_held_to_its_size(weaker_pool: RewardPool) -> None:
    """64 MiB may be used; a program that would be right after half a GiB in files of 1 MiB is ended before."""
    fill = "def f(x):\n    for i in range(512):\n        with open(str(i), 'wb') as file: file.write(bytes(2**20))\n    return 48271"
    verdict = weaker_pool.score("code", response(fill), {"tests": ["assert f(2) == 48271"]})
    assert verdict.reward == 0.0
    assert leftovers(weaker_pool) == []


# -- as somebody else --------------------------------------------------------------------------------------------------

SCRIPT = """
import dataclasses, json, sys
from reward import RewardPool, TaskLimits, sandbox
request = json.load(sys.stdin)
found = {"probe": sandbox.probe(), "why_not": {tier: sandbox.why_not(tier) for tier in sandbox.TIERS}, "verdicts": {}}
for tier in request["tiers"]:
    sandbox.probe = lambda: sandbox.Tier(tier)
    with RewardPool(code=TaskLimits(deadline_s=2.0)) as pool:
        verdicts = [pool.score("code", program, reference) for program, reference in request["items"]]
        found["verdicts"][tier] = [dataclasses.asdict(v) for v in verdicts]
try:
    sandbox.probe = lambda: found["probe"]
    RewardPool(min_tier="namespace").close()
except sandbox.TierError as error:
    found["refusal"] = str(error)
json.dump(found, sys.stdout)
"""


def run_as(command: list[str], tiers: list[str], items: list[tuple[str, Any]]) -> dict[str, Any]:
    """What `SCRIPT` finds when `command` starts it, with a copy of the package that anybody may read."""
    folder = Path(tempfile.mkdtemp(prefix="reward-test-", dir="/tmp"))
    try:
        folder.chmod(0o755)
        shutil.copytree(ROOT / "reward", folder / "reward", ignore=shutil.ignore_patterns("__pycache__"))
        request = json.dumps({"tiers": tiers, "items": items})
        result = subprocess.run(
            command, input=request, capture_output=True, text=True, cwd=folder, check=False, timeout=120
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def anybodys_python() -> str:
    """An interpreter that an ordinary user may start; the one that runs the tests may lie in root's home."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become an ordinary user")
    probe = "import os, sys; sys.exit(sys.version_info < (3, 11) or not os.access(sys.executable, os.X_OK))"
    for candidate in (os.path.realpath(sys.executable), shutil.which("python3", path="/usr/bin:/usr/local/bin")):
        if (
            candidate
            and subprocess.run([*ANYBODY, candidate, "-c", probe], capture_output=True, check=False).returncode == 0
        ):
            return candidate
    pytest.skip("no interpreter of Python 3.11 or newer that an ordinary user may start")


RIGHT = "def f(x): return 48271 if x == 2 else 16807"
AGAINST_THE_SAME_USER = {
    "limits of the server": "import resource, os\nfor pid in (1, os.getppid()):\n    try: resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0))\n"
    "    except OSError: pass\ndef f(x): return 0",
    "interrupts the server": "import os\nfor pid in (1, os.getppid()):\n    for signal in (2, 15, 9, 19):\n        try: os.kill(pid, signal)\n"
    "        except OSError: pass\ndef f(x): return 0",
    "memory of the server": "import os\ndef f(x):\n    open(f'/proc/{os.getppid()}/mem', 'rb').read(1)\n    return 48271 if x == 2 else 16807",
    "another user namespace": "import ctypes\ndef f(x):\n    assert ctypes.CDLL(None).unshare(0x10000000) == 0\n    return 48271 if x == 2 else 16807",
    "mode of a host file": "import os\ndef f(x):\n    os.chmod('/tmp', 0o777)\n    return 48271 if x == 2 else 16807",
    "sleeps on without its server": "import ctypes, time\nassert ctypes.CDLL(None).prctl(1, 0) == 0\nwhile True: time.sleep(1)",
}


@pytest.mark.root
def test_an_ordinary_user_has_both_tiers_and_every_exploit_fails(anybodys_python: str) -> None:
    programs = [*AGAINST_THE_SAME_USER.values(), *EXPLOITS.values(), SLOW_EXPLOITS["sleeps"]]
    items = [(response(program), REFERENCE) for program in (RIGHT, *programs, RIGHT)] + [(response(RIGHT), JUDGED)]
    found = run_as([*ANYBODY, anybodys_python, "-c", SCRIPT], ["namespace", "landlock"], items)
    assert found["probe"] == "namespace" and found["why_not"]["landlock"] is None
    for tier, verdicts in found["verdicts"].items():
        rewards = [verdict["reward"] for verdict in verdicts]
        assert rewards == [1.0] + [0.0] * len(programs) + [1.0, 1.0], (tier, verdicts)
        assert {verdict["outcome"] for verdict in verdicts} <= {"correct", "wrong", "timeout"}


@pytest.mark.root
def test_where_namespaces_are_forbidden_landlock_serves_and_the_reason_is_told(anybodys_python: str) -> None:
    """Root without CAP_SYS_ADMIN, as in a container: unshare fails, Landlock does not."""
    command = ["setpriv", "--bounding-set=-sys_admin", anybodys_python, "-c", SCRIPT]
    found = run_as(command, ["landlock"], [(response(RIGHT), REFERENCE), (response(EXPLOITS["forks"]), REFERENCE)])
    assert found["probe"] == "landlock"
    assert "unshare" in found["why_not"]["namespace"]
    assert [verdict["reward"] for verdict in found["verdicts"]["landlock"]] == [1.0, 0.0]
    assert "offers landlock" in found["refusal"] and "unshare" in found["refusal"]
