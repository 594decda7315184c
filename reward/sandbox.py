"""The parent's side of the sandbox: one fork server, and the runs it starts.

A run is a jailed child (child/zygote.py) and a socket to it. Its isolation tier is probed once per process:

    namespaces    own PID, network, mount, IPC and host-name namespaces (and user namespace when not root), a root with
                  nothing but the interpreter, no /proc, a private /tmp, no capabilities, seccomp, resource limits
    rlimits-only  a process group, resource limits, seccomp where known; host files stay readable
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

TIERS = ("namespaces", "rlimits-only")
MAX_RUN_BYTES = 4 << 20
START_DEADLINE_S = 60.0
REPLY_DEADLINE_S = 20.0
_ZYGOTE = Path(__file__).parent / "child" / "zygote.py"


class SandboxError(RuntimeError):
    """The sandbox itself failed: says nothing about the program that ran in it."""


class RunTimeoutError(Exception):
    """A run reached its deadline."""


class RunEndedError(Exception):
    """A run closed its channel, or broke its protocol, before it had answered."""


class Run:
    """One jailed child and the channel to it. Use only from the thread that started it."""

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self._channel = channel
        self.pid = pid
        self.nonce = secrets.token_hex(8)
        self._num_bytes = 0
        self._pending = bytearray()

    def send(self, job: dict[str, Any], deadline: float) -> None:
        """Sends the job; `deadline` is on time.monotonic(). Raises RunTimeoutError, RunEndedError."""
        body = json.dumps({**job, "nonce": self.nonce}).encode()
        self._channel.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            self._channel.sendall(struct.pack(">I", len(body)) + body)
        except TimeoutError:
            raise RunTimeoutError from None
        except OSError as error:
            raise RunEndedError(str(error)) from None

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next frame of this run. Raises RunTimeoutError, RunEndedError (gone, malformed, too much, wrong nonce)."""
        size = struct.unpack(">I", self._read_exactly(4, deadline))[0]
        if self._num_bytes + size > MAX_RUN_BYTES:
            raise RunEndedError(f"more than {MAX_RUN_BYTES} bytes of results")
        try:
            frame = json.loads(self._read_exactly(size, deadline))
        except (ValueError, RecursionError):
            raise RunEndedError("a malformed result") from None
        if type(frame) is not dict or frame.get("nonce") != self.nonce:
            raise RunEndedError("a result without the nonce of this run")
        return frame

    def _read_exactly(self, size: int, deadline: float) -> bytes:
        while len(self._pending) < size:
            self._channel.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                part = self._channel.recv(1 << 16)
            except TimeoutError:
                raise RunTimeoutError from None
            except OSError as error:
                raise RunEndedError(str(error)) from None
            if not part:
                raise RunEndedError("the process ended")
            self._pending += part
            self._num_bytes += len(part)
            if time.monotonic() > deadline:
                raise RunTimeoutError
        body = bytes(self._pending[:size])
        del self._pending[:size]
        return body

    def close(self) -> None:
        self._channel.close()


class Sandbox:
    """A fork server and its runs; started at the first run, restarted after close(). Not thread safe.

    Args:
        preload: "" for programs of the standard library, "math" for math-verify.
        tier: one of TIERS; None probes.
        memory_bytes: address space of one run.
        cpu_s: CPU seconds of one run, a backstop behind the caller's deadline.
    """

    def __init__(
        self, *, preload: str = "", tier: str | None = None, memory_bytes: int = 2 << 30, cpu_s: int = 60
    ) -> None:
        self._preload = preload
        self._tier = tier
        self._limits = {
            "memory_bytes": memory_bytes,
            "cpu_s": cpu_s,
            "file_bytes": 16 << 20,
            "num_processes": 32,
            "num_files": 64,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._log: IO[bytes] | None = None
        self._scratch: str | None = None

    def start(self) -> None:
        """Starts the fork server if it does not run. Raises SandboxError with the tail of its log."""
        if self._process is not None:
            return
        tier = self._tier or probe()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "fd": theirs.fileno(),
            "tier": tier,
            "readable": _readable_paths(with_packages=bool(self._preload)),
            "limits": self._limits,
            "tmp_bytes": 64 << 20,
            # Any id without rights; one per server, because the process limit counts per id.
            "uid": 30000 + theirs.fileno() % 1000 + 1000 * (os.getpid() % 30),
            "preload": self._preload,
            # An isolated interpreter finds its own packages only where it was started by their environment's name.
            "packages": [path for path in sys.path if path.endswith("-packages")] if self._preload else [],
        }
        flags = ["-I", "-X", "utf8"] if self._preload else ["-I", "-S", "-X", "utf8"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._scratch = None if tier == "namespaces" else tempfile.mkdtemp(prefix="reward-")
        if self._scratch is not None:
            os.chmod(self._scratch, 0o777)
        self._process = subprocess.Popen(
            [sys.executable, *flags, str(_ZYGOTE), json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={},
            cwd=self._scratch or "/",
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._control = ours
        self._reply(START_DEADLINE_S)

    def spawn(self, *fds: int) -> Run:
        """Starts a run that holds its channel and then `fds`, in that order. Raises SandboxError."""
        self.start()
        assert self._control is not None
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._control, [b"spawn"], [theirs.fileno(), *fds])
            reply = self._reply(REPLY_DEADLINE_S)
        except OSError as error:
            ours.close()
            raise self._failure(str(error)) from None
        except SandboxError:
            ours.close()
            raise
        finally:
            theirs.close()
        if not reply.isdigit():
            ours.close()
            raise SandboxError(f"the fork server could not start a run: {reply}")
        return Run(ours, int(reply))

    def kill(self, run: Run) -> None:
        """Ends the run and everything it started; returns when they are gone. Raises SandboxError."""
        run.close()
        if self._control is None:
            return
        try:
            self._control.send(f"kill {run.pid}".encode())
        except OSError as error:
            raise self._failure(str(error)) from None
        self._reply(REPLY_DEADLINE_S)
        if self._scratch is not None:
            _empty(self._scratch)

    def close(self) -> None:
        """Ends the fork server and every run; leaves no process, descriptor or file."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            # Closing the control socket ends the server; killing makes it certain. Its namespace dies with it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def _reply(self, limit_s: float) -> str:
        assert self._control is not None
        ready, _, _ = select.select([self._control], [], [], limit_s)
        reply = self._control.recv(4096) if ready else b""
        if not reply:
            raise self._failure("it ended" if ready else f"no answer in {limit_s} s")
        return reply.decode()

    def _failure(self, why: str) -> SandboxError:
        tail = ""
        if self._log is not None:
            self._log.seek(0)
            tail = self._log.read().decode(errors="replace")[-2000:]
        self.close()
        return SandboxError(
            f"the sandbox's fork server failed ({why}); its log ends: {tail.strip()[-1500:] or 'empty'}"
        )

    def __del__(self) -> None:
        if self._process is not None:
            self.close()


def _empty(folder: str) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


@functools.cache
def _readable_paths(*, with_packages: bool) -> list[str]:
    """What an interpreter needs to see: shared libraries, the standard library, this package's child side."""
    paths = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    paths += [sysconfig.get_paths()["stdlib"], os.path.join(sys.base_prefix, "lib"), str(_ZYGOTE.parent)]
    if with_packages:
        paths += [*sys.path, sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    readable: list[str] = []
    # Parents first: a folder shown inside a parent that is not there yet would stand in for the whole parent.
    for absolute in sorted(os.path.abspath(path) for path in paths if path):
        if absolute != "/" and os.path.exists(absolute) and not _is_below(absolute, readable):
            readable.append(absolute)
    return readable


def _is_below(path: str, parents: Sequence[str]) -> bool:
    return any(path == parent or path.startswith(parent + "/") for parent in parents if not os.path.islink(parent))


@functools.cache
def probe() -> str:
    """The strongest isolation tier that works on this machine, tried by starting a fork server and one run in it."""
    for tier in TIERS[:-1]:
        sandbox = Sandbox(tier=tier)
        try:
            sandbox.kill(sandbox.spawn())
        except SandboxError:
            continue
        finally:
            sandbox.close()
        return tier
    return TIERS[-1]
