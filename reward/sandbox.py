"""The parent's side of the sandbox: fork servers, the runs they start, and how strongly this machine walls them off."""

from __future__ import annotations

import contextlib
import enum
import functools
import glob
import importlib.util
import json
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from reward.child import scratch

Kind = Literal["candidate", "judge", "algebra"]
TMP_BYTES = 64 * 2**20
_START_S = 60.0
_CONTROL_S = 15.0
_PACKAGE = Path(__file__).parent
_LIBRARIES = ("/lib64", "/usr/lib64", "/nix/store", "/etc/ld.so.cache", "/usr/share/zoneinfo")
# Installed packages: other people's code, and this machine's data with it.
_HIDDEN = ("/usr/lib*/python*/dist-packages", "/usr/lib*/python*/site-packages")
# Registers `reward` as a bare package, so that the server imports its own few modules and not this side of it.
_BOOT = """
import sys, types
package = types.ModuleType("reward")
package.__path__ = [sys.argv[3]]
sys.modules["reward"] = package
from reward.child.zygote import main
main()
"""


class Tier(enum.StrEnum):
    """How strongly a run is walled off, strongest first."""

    NAMESPACE = "namespace"
    """Own pid, net, mount, ipc and uts namespaces (and user namespace unless root), a root with nothing but the
    interpreter, no /proc, no capability, seccomp, limits."""
    LANDLOCK = "landlock"
    """Landlock, seccomp, limits: nothing of the host can be opened but the interpreter; names of files can be guessed."""
    RLIMITS_ONLY = "rlimits-only"
    """Limits, and seccomp where this machine is known; the host's files stay readable."""


TIERS: tuple[Tier, ...] = tuple(Tier)
REMEDY = (
    "Allow user namespaces (sysctl kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0; in a"
    " container, its seccomp and AppArmor profiles must let unshare and mount through), or use Linux 6.2 or newer with Landlock"
)


class SandboxError(RuntimeError):
    """The sandbox itself failed; says nothing about what ran in it."""


class TierError(RuntimeError):
    """This machine cannot isolate a run as strongly as was asked; names what it can do, why not more, and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Resource limits of one run; its wall clock is the caller's."""

    cpu_s: int
    memory_bytes: int = 2 * 2**30
    file_bytes: int = 16 * 2**20
    num_processes: int = 32
    num_files: int = 64


class ForkServer:
    """One fork server (child/zygote.py), started at the first run and again after `close`. Not thread safe, one run at a time.

    Args:
        kind: what its children do: the module of that name in reward.child.
        tier: the isolation to build; None is the strongest that works here.
        max_runs: after so many runs the next one starts a fresh server.
    """

    def __init__(self, kind: Kind, tier: Tier | None = None, *, max_runs: int = 2000) -> None:
        self.kind = kind
        self._tier = tier
        self._max_runs, self._num_runs = max_runs, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._tmp: str | None = None
        self._owner = 0

    def start(self) -> None:
        """Start the server if it is not running. Raise SandboxError with the reason."""
        if self._process is not None and self._owner == os.getpid():
            return
        self.close()
        tier = self._tier or probe()
        self._owner = os.getpid()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if tier is not Tier.NAMESPACE:
                self._tmp = tempfile.mkdtemp(prefix="reward-")
            path = _library_path() if self.kind == "algebra" else []
            readable = _readable((*_standard_paths(), *path))
            config = {"kind": self.kind, "tier": tier.value, "readable": readable, "path": path}
            config |= {"hidden": [folder for folder in _hidden_paths() if folder not in path]}
            config |= {"tmp": self._tmp, "tmp_bytes": TMP_BYTES}
            self._process = _spawn(config, theirs)
            theirs.close()
            self._receive(_START_S)
        except (OSError, SandboxError) as error:
            self.close()
            raise SandboxError(f"the {self.kind} fork server did not start in tier {tier.value}: {error}") from error
        finally:
            theirs.close()

    @contextlib.contextmanager
    def run(self, limits: Limits, *extra: socket.socket | int) -> Iterator[socket.socket]:
        """A new child, ready for its first frame, and our end of its channel; after the block nothing of it is left.

        Args:
            extra: further descriptors for the child; the caller closes its own copies.

        Raises:
            SandboxError: the child could not be started; the next run starts a new server.
        """
        if self._num_runs >= self._max_runs:
            self.close()
        self.start()
        self._num_runs += 1
        ours, theirs = socket.socketpair()
        try:
            self._ask_for_run(limits, ours, theirs, extra)
            yield ours
        except SandboxError:
            self.close()
            raise
        finally:
            theirs.close()
            ours.close()
            self._sweep()

    def close(self) -> None:
        """End the server and everything it started, and reap it. Safe to call twice."""
        self._num_runs = 0
        if self._process is not None and self._owner != os.getpid():
            # In a fork of the owner: what is the owner's to end stays, and `returncode` keeps Popen from warning.
            self._process.returncode = 0
            self._process = self._tmp = None
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._tmp is not None:
            scratch.empty(self._tmp)
            os.rmdir(self._tmp)
            self._tmp = None

    def _ask_for_run(
        self, limits: Limits, ours: socket.socket, theirs: socket.socket, extra: tuple[socket.socket | int, ...]
    ) -> None:
        assert self._control is not None
        descriptors = [theirs.fileno(), *(x if isinstance(x, int) else x.fileno() for x in extra)]
        request = json.dumps({"op": "run", "limits": asdict(limits)}).encode()
        try:
            self._control.settimeout(_CONTROL_S)
            socket.send_fds(self._control, [request], descriptors)
            theirs.close()
            ours.settimeout(_CONTROL_S)
            if ours.recv(1) != b"+":
                raise SandboxError(f"the {self.kind} fork server could not start a child")
        except OSError as error:
            raise SandboxError(f"the {self.kind} fork server does not answer: {error}") from error

    def _sweep(self) -> None:
        if self._control is None:
            return
        try:
            self._control.settimeout(_CONTROL_S)
            self._control.send(b'{"op": "sweep"}')
            self._receive(_CONTROL_S)
        except (OSError, SandboxError):
            # The verdict stands; ending the server ends what it could not sweep, and the next run starts another.
            self.close()

    def _receive(self, limit_s: float) -> dict[str, Any]:
        assert self._control is not None
        self._control.settimeout(limit_s)
        try:
            message = self._control.recv(1 << 16)
        except TimeoutError:
            raise SandboxError(f"no answer in {limit_s:g} s") from None
        reply: dict[str, Any] = json.loads(message) if message else {"error": "it ended without a word"}
        if "error" in reply:
            raise SandboxError(reply["error"])
        return reply


def choose_tier(least: Tier, *, unsafe_allow_rlimits_only: bool = False) -> Tier:
    """The strongest tier that works on this machine.

    Args:
        least: NAMESPACE or LANDLOCK.
        unsafe_allow_rlimits_only: take whatever there is: model-written code can then read this machine's files.

    Raises:
        ValueError: `least` is RLIMITS_ONLY, which only the unsafe flag admits.
        TierError: the machine offers less than was asked.
    """
    if least is Tier.RLIMITS_ONLY:
        raise ValueError(
            f"min_tier must be one of {[str(tier) for tier in TIERS[:-1]]}; tier {least} needs the unsafe flag"
        )
    found = probe()
    if unsafe_allow_rlimits_only or TIERS.index(found) <= TIERS.index(least):
        return found
    reasons = "; ".join(f"{tier}: {why_not(tier)}" for tier in TIERS[: TIERS.index(found)])
    raise TierError(
        f"runs need isolation of tier {least} or stronger, and this machine offers {found} ({reasons}). {REMEDY}, or"
        + (" set min_tier to landlock" if found is Tier.LANDLOCK else " accept the risk with unsafe_allow_rlimits_only")
    )


@functools.cache
def probe() -> Tier:
    """The strongest tier that works on this machine, found by starting a fork server in it; once per process."""
    return next(tier for tier in TIERS if tier is TIERS[-1] or why_not(tier) is None)


@functools.cache
def why_not(tier: Tier) -> str | None:
    """None where the tier works here, else the reason, for a person."""
    server = ForkServer("candidate", tier)
    try:
        with server.run(Limits(cpu_s=1)):
            return None
    except SandboxError as error:
        return str(error)
    finally:
        server.close()


def _spawn(config: dict[str, Any], control: socket.socket) -> subprocess.Popen[bytes]:
    # -I would also ignore PYTHONHASHSEED, without which the order of a set differs from server to server.
    command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", _BOOT, json.dumps(config)]
    environment = {"PYTHONHASHSEED": "0"}
    if "LD_LIBRARY_PATH" in os.environ:
        # Some interpreters find their own libpython by it; the server clears its environment once it runs.
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return subprocess.Popen(
        [*command, str(control.fileno()), str(_PACKAGE)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        pass_fds=[control.fileno()],
        start_new_session=True,
    )


def _standard_paths() -> tuple[str, ...]:
    """What an interpreter reads: shared libraries, the standard library, this package's child side."""
    multiarch = f"/usr/lib/{sysconfig.get_config_var('MULTIARCH') or '?'}"
    system = [multiarch, multiarch.removeprefix("/usr")] if os.path.isdir(multiarch) else ["/usr/lib", "/lib"]
    own = glob.glob(os.path.join(glob.escape(sys.base_prefix), "lib", "*.so*"))
    return (*_LIBRARIES, *system, *own, sysconfig.get_path("stdlib"), str(_PACKAGE / "child"))


def _hidden_paths() -> list[str]:
    """Folders below the standard paths that a run has no use for."""
    stdlib = glob.escape(sysconfig.get_path("stdlib"))
    patterns = (*_HIDDEN, f"{stdlib}/site-packages", f"{stdlib}/test")
    return [path for pattern in patterns for path in glob.glob(pattern) if os.path.isdir(path)]


def _readable(paths: tuple[str, ...]) -> list[str]:
    """Those that exist, absolute, none below another."""
    kept: list[str] = []
    for path in map(os.path.abspath, paths):
        below = any(path == other or path.startswith(other + "/") for other in kept if not os.path.islink(other))
        if path != "/" and os.path.exists(path) and not below:
            kept.append(path)
    return kept


@functools.cache
def _library_path() -> list[str]:
    """The folders that hold math-verify and what it imports. Raise SandboxError where it is not installed."""
    found = []
    for name in ("math_verify", "latex2sympy2_extended", "sympy", "mpmath", "antlr4"):
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise SandboxError(f"{name} is not installed: pip install 'math-verify[antlr4_13_2]==0.9.0'")
        found.append(str(Path(next(iter(spec.submodule_search_locations))).parent))
    return list(dict.fromkeys(found))
