"""A fork server: a small warm interpreter that starts one jailed child per run.

Run as a script with one JSON argument (see main). The control socket carries one request and one reply at a time:

    "spawn" + file descriptors (channel, [peer] or [stdin, stdout])  ->  "<pid>" or "error <why>"
    "kill <pid>"                                                    ->  "dead" once the run and its descendants are gone

The zygote never reads a channel, so no child inherits another run's program, calls or expected values in its memory.
It ends, and everything below it, when the control socket closes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import sys
import types
from typing import Any

if __name__ == "__main__":
    # Importable siblings without running the parent package and without leaving its folder on sys.path.
    _package = types.ModuleType("reward")
    _package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["reward"] = _package

from reward.child import jail, programs

MAX_MESSAGE_BYTES = 4096
CHANNEL_FD, SECOND_FD, THIRD_FD = 3, 4, 5


def enter_tier(tier: str, readable: list[str]) -> int | None:
    """Isolates this process; returns the descriptor of its own PID namespace in the 'namespaces' tier, else None.

    In that tier the caller goes on as process 1 of a new PID namespace, below a parent that only waits for it.
    """
    if tier != "namespaces":
        jail.prctl(jail.PR_SET_CHILD_SUBREAPER, 1)
        return None
    jail.enter_namespaces()
    pid = os.fork()
    if pid:
        os.closerange(3, 256)
        _, status = os.waitpid(pid, 0)
        os._exit(min(os.waitstatus_to_exitcode(status) & 0xFF, 255))
    jail.prctl(jail.PR_SET_PDEATHSIG, signal.SIGKILL)
    own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    jail.enter_private_root(readable)
    return own_pid_namespace


class Zygote:
    """The control loop; single-threaded, so that a fork copies no lock that somebody holds."""

    def __init__(self, control: socket.socket, settings: dict[str, Any], pid_namespace: int | None) -> None:
        self._control = control
        self._settings = settings
        self._pid_namespace = pid_namespace
        self._live: set[int] = set()

    def serve(self) -> None:
        while True:
            message, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 4)
            if not message:
                return
            if message.startswith(b"spawn"):
                reply = self._spawn(fds)
            else:
                self._kill(int(message.split()[1]))
                reply = "dead"
            self._control.send(reply.encode())

    def _spawn(self, fds: list[int]) -> str:
        try:
            pid = self._fork(fds)
        except OSError as error:
            return f"error {error}"
        finally:
            # The parent only: the child never returns from _fork.
            for fd in fds:
                os.close(fd)
        self._live.add(pid)
        return str(pid)

    def _fork(self, fds: list[int]) -> int:
        if self._pid_namespace is None:
            pid = os.fork()
        else:
            jail.unshare(jail.CLONE_NEWPID)
            try:
                pid = os.fork()
                if pid == 0:
                    self._become_run(fds)
            finally:
                # Back to our own namespace, so that the next run can have its own.
                jail.setns(self._pid_namespace, jail.CLONE_NEWPID)
        if pid == 0:
            self._become_run(fds)
        return pid

    def _become_run(self, fds: list[int]) -> None:
        """In the child: enters the jail, runs the job from the channel, never returns."""
        try:
            os.setsid()
            self._arrange_descriptors(fds)
            settings = self._settings
            if self._pid_namespace is not None:
                jail.enter_private_tmp(settings["tmp_bytes"])
            else:
                jail.prctl(jail.PR_SET_PDEATHSIG, signal.SIGKILL)
            jail.limit_resources(**settings["limits"])
            jail.drop_privileges(settings["uid"])
            jail.refuse_system_calls(also_signals_and_network=self._pid_namespace is None)
            programs.run_job(CHANNEL_FD)
        finally:
            os._exit(1)

    def _arrange_descriptors(self, fds: list[int]) -> None:
        null = os.open("/dev/null", os.O_RDWR)
        high = [os.dup2(fd, 64 + index) for index, fd in enumerate([null, *fds])]
        for target in (0, 1, 2):
            os.dup2(high[0], target)
        for index, fd in enumerate(high[1:]):
            os.dup2(fd, CHANNEL_FD + index)
        os.closerange(CHANNEL_FD + len(fds), 256)

    def _kill(self, pid: int) -> None:
        if pid not in self._live:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if self._pid_namespace is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        # A PID namespace's first process is waitable only after every other process in it is gone.
        os.waitpid(pid, 0)
        self._live.discard(pid)
        self._kill_orphans()

    def _kill_orphans(self) -> None:
        """Descendants that left the process group: as sub-reaper (or process 1) they become our children."""
        if self._pid_namespace is not None:
            return
        while True:
            orphans = [pid for pid in _children_of(os.getpid()) if pid not in self._live]
            if not orphans:
                return
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)


def _children_of(parent: int) -> list[int]:
    children = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                children.append(int(name))
    return children


def main() -> None:
    """argv[1]: {"fd", "tier", "readable", "limits", "tmp_bytes", "uid", "preload", "packages"} as JSON."""
    settings = json.loads(sys.argv[1])
    control = socket.socket(fileno=settings["fd"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pid_namespace = enter_tier(settings["tier"], settings["readable"])
    jail.prctl(jail.PR_SET_DUMPABLE, 0)
    sys.path += [path for path in settings["packages"] if path not in sys.path]
    programs.preload(settings["preload"])
    os.environ.clear()
    os.environ["HOME"] = os.environ["TMPDIR"] = "/tmp"
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    Zygote(control, settings, pid_namespace).serve()


if __name__ == "__main__":
    main()
