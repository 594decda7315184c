"""Linux isolation by ctypes: namespaces, a private root, privileges, limits. User namespaces make it work without rights."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
from collections.abc import Sequence

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
SCRATCH = "/scratch"
AT_RECURSIVE = 0x8000
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
SYS_MOUNT_SETATTR = 442

libc = ctypes.CDLL(None, use_errno=True)
MACHINE = platform.machine()


def check(result: int, what: str) -> int:
    """The result of a C call. Raise OSError with its errno where it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    check(libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, flags: int) -> None:
    check(libc.setns(fd, flags), "setns")


def prctl(option: int, value: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    check(libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def enter_namespaces() -> None:
    """Moves this process into new mount, network, IPC and host-name namespaces, and its next child into a new PID one.

    As root the caller's user namespace is kept (runs then switch to an unprivileged uid); anybody else gets a user
    namespace of one identity-mapped id. Raises OSError where the kernel or the container forbids it.
    """
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        unshare(flags)
        return
    unshare(flags | CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def enter_private_root(readable: Sequence[str], hidden: Sequence[str]) -> None:
    """Replaces the root by an empty read-only tmpfs that shows `readable` (read-only) without the folders `hidden`, four
    devices and an empty folder for `mount_scratch`.

    There is no /proc and no host path besides. Needs enter_namespaces. Raises OSError.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    # /proc is the one directory that exists everywhere and that nothing readable lies under.
    root = "/proc"
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for name in ("scratch", "dev", "oldroot"):
        os.mkdir(f"{root}/{name}", 0o755)
    for path in readable:
        _show(path, root)
    for path in hidden:
        if os.path.isdir(root + os.path.realpath(path)):
            mount("tmpfs", root + os.path.realpath(path), "tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, "mode=755,size=4k")
    for name in ("null", "zero", "urandom", "random"):
        with open(f"{root}/dev/{name}", "w", encoding="ascii"):
            pass
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND)
    os.symlink(SCRATCH, f"{root}/dev/shm")
    # Unless this interpreter or its packages live below /tmp, it is another name of the scratch folder.
    if not os.path.lexists(f"{root}/tmp"):
        os.symlink(SCRATCH, f"{root}/tmp")
    check(libc.syscall(SYS_PIVOT_ROOT[MACHINE], root.encode(), f"{root}/oldroot".encode()), "pivot_root")
    os.chdir("/")
    check(libc.umount2(b"/oldroot", MNT_DETACH), "umount2")
    os.rmdir("/oldroot")
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _show(path: str, root: str) -> None:
    target = root + path
    if os.path.lexists(target):
        return
    if os.path.islink(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w", encoding="ascii"):
            pass
    mount(path, target, None, MS_BIND | MS_REC)
    attributes = struct.pack("=QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    result = libc.syscall(SYS_MOUNT_SETATTR, -100, target.encode(), AT_RECURSIVE, attributes, len(attributes))
    if result < 0:
        # Before Linux 5.12: the bound tree itself; flags locked by an outer user namespace must be repeated.
        mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | os.statvfs(path).f_flag)


def mount_scratch(size_bytes: int, *, replace: bool = False) -> None:
    """Empty scratch space in a private root, as the working folder; `replace` drops the used one first."""
    os.chdir("/")
    if replace:
        check(libc.umount2(SCRATCH.encode(), MNT_DETACH), f"umount2 {SCRATCH}")
    mount("tmpfs", SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={size_bytes},nr_inodes=4096")
    os.chdir(SCRATCH)


def drop_privileges(uid: int | None) -> None:
    """Becomes `uid` if there is one, and gives up every capability for good."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if MACHINE in SYS_CAPSET:
        header = struct.pack("=Ii", 0x20080522, 0)
        check(libc.syscall(SYS_CAPSET[MACHINE], header, struct.pack("=6I", *[0] * 6)), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def num_own_tasks() -> int:
    """Processes and threads of this user: outside a user namespace the process limit counts them all."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def limit_resources(*, memory_bytes: int, cpu_s: int, file_bytes: int, num_processes: int, num_files: int) -> None:
    """Sets hard limits; a process may lower them, never raise them."""
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, num_processes),
        (resource.RLIMIT_NOFILE, num_files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu_s),
    ):
        resource.setrlimit(kind, (value, value))
