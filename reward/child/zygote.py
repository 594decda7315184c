"""The fork server: a small single-threaded process that forks one jailed child per run and sweeps up after it.

Protocol on its control socket (SOCK_SEQPACKET, one JSON object a message): it says {"ready": true} or {"error": ...} once,
then obeys {"op": "run", "limits": ...} with the child's channels as descriptors, and {"op": "sweep"}, which is answered
{"swept": n} once every process but itself is dead and reaped and the scratch folder is empty. End of file means the pool
is gone. Untrusted code runs in its children alone, which share with it nothing but its memory image at the fork, and
nothing about a run ever enters that image.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from reward.child import jail, landlock, scratch, seccomp

_PRELOADED = (
    "abc array bisect cmath collections contextlib copy dataclasses datetime decimal enum fractions functools heapq io "
    "itertools json math numbers operator queue random re statistics string struct sys textwrap threading time typing"
)
_CHANNEL_FD = 3
_LIMITED_USERS = (30000, 60000)
_QUOTA_CHECK_S = 0.05
Run = Callable[[list[socket.socket]], None]


def main() -> NoReturn:
    """Launcher: build the namespaces, fork the server into them, and outlive it only to reap it.

    argv: {"kind", "tier", "readable", "hidden", "path", "tmp", "tmp_bytes"} as JSON, and the descriptor of the control socket.
    """
    config = json.loads(sys.argv[1])
    control = socket.socket(fileno=int(sys.argv[2]))
    parent = os.getppid()
    # Untrusted children of root become a user without rights; one per server, since the process limit counts per user.
    low, high = _LIMITED_USERS
    uid = low + os.getpid() % (high - low) if os.geteuid() == 0 else None
    try:
        if config["tier"] == "namespace":
            jail.enter_namespaces()
        server = os.fork()
    except OSError as error:
        control.send(json.dumps({"error": str(error)}).encode())
        os._exit(1)
    if server == 0:
        try:
            _Server(control, config, uid).serve()
        except BaseException as error:  # noqa: BLE001 - the last chance to say why
            with contextlib.suppress(OSError):
                control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        os._exit(1)
    control.close()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while os.waitpid(server, os.WNOHANG) == (0, 0):
        signal.sigtimedwait({signal.SIGCHLD}, 1.0)
        # A copy of the control socket in a fork of the parent would hide the parent's death; its pid does not.
        if os.getppid() != parent:
            os.kill(server, signal.SIGKILL)
    os._exit(0)


class _Server:
    """The control loop, as process 1 of its own pid namespace where the tier has one."""

    def __init__(self, control: socket.socket, config: dict[str, Any], uid: int | None) -> None:
        self._control = control
        self._tmp_bytes: int = config["tmp_bytes"]
        self._tier: str = config["tier"]
        self._namespaced = self._tier == "namespace"
        self._uid = uid
        self._rules: int | None = None
        # Python's handler would let a run of the same user interrupt process 1 of its namespace.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        jail.prctl(jail.PR_SET_PDEATHSIG, signal.SIGKILL)
        jail.prctl(jail.PR_SET_CHILD_SUBREAPER, 1)
        jail.prctl(jail.PR_SET_DUMPABLE, 0)
        if self._namespaced:
            jail.enter_private_root(config["readable"], config["hidden"])
            jail.mount_scratch(self._tmp_bytes)
        else:
            os.chdir(config["tmp"])
            if uid is not None:
                os.chown(".", uid, uid)
        if self._tier == "landlock":
            self._rules = landlock.ruleset(config["readable"], config["hidden"], config["tmp"])
        os.environ.clear()
        os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
        self._run = self._load(config["kind"], config["path"])
        gc.collect()
        gc.freeze()

    def serve(self) -> NoReturn:
        self._control.send(b'{"ready": true}')
        while True:
            if not self._namespaced:
                self._hold_scratch_to_its_size()
            message, descriptors, _, _ = socket.recv_fds(self._control, 1 << 16, 4)
            if not message:
                os._exit(0)
            request = json.loads(message)
            if request["op"] == "run":
                self._fork(request["limits"], descriptors)
            else:
                self._control.send(json.dumps({"swept": self._sweep()}).encode())

    def _load(self, kind: str, path: list[str]) -> Run:
        for name in _PRELOADED.split():
            importlib.import_module(name)
        sys.path += path
        run: Run = importlib.import_module(f"reward.child.{kind}").run
        # `reward` is how this process found its own modules; a child has no business with it.
        for name in [name for name in sys.modules if name.split(".")[0] == "reward"]:
            del sys.modules[name]
        # A run sees the arguments of a script, and the names that `site` defines.
        sys.argv[:] = sys.orig_argv[:] = ["solution.py"]
        builtins.exit = builtins.quit = sys.exit
        # Every run starts from one state, so that the same program gets the same verdict.
        random.seed(0)
        return run

    def _fork(self, limits: dict[str, int], descriptors: list[int]) -> None:
        limits = dict(limits)
        if not self._namespaced and self._uid is None:
            limits["num_processes"] += jail.num_own_tasks()
        try:
            child = os.fork()
        except OSError:
            child = -1  # Closing the channels tells the parent.
        if child == 0:
            try:
                self._become_run(limits, descriptors)
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)

    def _become_run(self, limits: dict[str, int], descriptors: list[int]) -> None:
        """In the child: descriptors 0 to 2 are /dev/null, the channels follow, and nothing else survives."""
        os.setsid()
        jail.drop_privileges(self._uid)
        # After the change of user, which clears it.
        jail.prctl(jail.PR_SET_PDEATHSIG, signal.SIGKILL)
        if self._rules is not None:
            landlock.restrict(self._rules)
        high = [os.dup2(descriptor, 100 + index) for index, descriptor in enumerate(descriptors)]
        channels = [os.dup2(descriptor, _CHANNEL_FD + index) for index, descriptor in enumerate(high)]
        os.closerange(_CHANNEL_FD + len(channels), 4096)
        jail.limit_resources(**limits)
        # Of a tier that wipes its files by name, and has no other user for its runs, the host's files are in reach.
        filtered = seccomp.restrict(host_files_in_reach=not self._namespaced and self._uid is None)
        if not filtered and self._tier != "rlimits-only":
            raise OSError(f"no system call filter for {jail.MACHINE}")
        sockets = [socket.socket(fileno=descriptor) for descriptor in channels]
        sockets[0].sendall(b"+")
        self._run(sockets)

    def _hold_scratch_to_its_size(self) -> None:
        """Until the next message: end a run that writes more than a tmpfs of the namespace tier would have held."""
        while not select.select([self._control], [], [], _QUOTA_CHECK_S if _children() else None)[0]:
            if scratch.bytes_below(".") > self._tmp_bytes:
                self._kill_children()

    def _kill_children(self) -> None:
        for pid in _children():
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(pid, signal.SIGKILL)

    def _sweep(self) -> int:
        """Kill and reap all that is left of a run, wherever it moved to; the number of processes reaped."""
        swept = 0
        while True:
            if self._namespaced:
                # From process 1 this reaches every process of the namespace at once: nothing can fork its way out.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            else:
                self._kill_children()
            try:
                while os.waitpid(-1, 0 if self._namespaced else os.WNOHANG) != (0, 0):
                    swept += 1
                time.sleep(0.0005)
            except ChildProcessError:
                break
        if os.listdir("."):
            self._empty_scratch()
        return swept

    def _empty_scratch(self) -> None:
        if self._namespaced:
            jail.mount_scratch(self._tmp_bytes, replace=True)
            return
        scratch.empty(".")


def _children() -> list[int]:
    """Direct children; the orphans of a run are among them, because the server is their reaper."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(pid) for pid in file.read().split()]
    except FileNotFoundError:
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
        return found
