"""The system calls a run may not make, as one filter for every tier.

A run is one process: it cannot fork, so that its memory limit bounds all of it and one signal ends all of it. It cannot
touch another process, open a socket, leave memory behind that outlives it, or reach kernel interfaces no solution needs.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from reward.child import jail

PR_SET_SECCOMP, MODE_FILTER = 22, 2
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x50000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_CLONE3 = 435
_FIRST_UNKNOWN = 463
"""System calls from this number on came after this table was written."""
_CLONE_THREAD, _CLONE_ANY_NAMESPACE = 0x10000, 0x7E020000

# Number on x86_64 and on aarch64, None where a machine has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # another process, in any way
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
    # the network; a socketpair stays
    "socket": (41, 198),
    # memory that outlives a process or escapes its limit
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # namespaces, mounts, files by handle
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "statmount": (457, 457), "listmount": (458, 458), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "fanotify_init": (300, 262), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    # the kernel itself
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "syslog": (103, 116),
    "personality": (135, 92), "modify_ldt": (154, None), "reboot": (169, 142),
}  # fmt: skip
# Landlock does not govern what a file is called, who owns it and how it is marked.
_METADATA: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
}  # fmt: skip
# The first argument names a process, which must be the caller.
_OWN_PROCESS_ONLY: dict[str, tuple[int | None, int | None]] = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "prlimit64": (302, 261),
}  # fmt: skip
_CLONE = (56, 220)
_PRCTL = (157, 167)

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_Line = tuple[int, int, int, int]
_REFUSE: _Line = (_RETURN, 0, 0, _ERRNO | _EPERM)


def restrict(*, host_files_in_reach: bool) -> bool:
    """Install the filter for this process for good; False where the machine has no table here.

    Needs `jail.drop_privileges` first. A refused call fails with EPERM. clone3, whose flags no filter can read, fails with
    ENOSYS, and libc falls back to clone. A call of a foreign ABI kills the process.

    Args:
        host_files_in_reach: also refuse changes of a file's mode, owner, attributes and times.
    """
    if jail.MACHINE not in _AUDIT_ARCH:
        return False
    code = b"".join(struct.pack("=HBBI", *line) for line in _program(host_files_in_reach))
    buffer = ctypes.create_string_buffer(code)
    filter_program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    jail.check(jail.libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(MODE_FILTER), filter_program, 0, 0), "seccomp")
    return True


def _program(host_files_in_reach: bool) -> list[_Line]:
    program: list[_Line] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _AUDIT_ARCH[jail.MACHINE]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if jail.MACHINE == "x86_64":
        # The x32 ABI: the same architecture, other numbers.
        program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    program += _when(_CLONE3, [(_RETURN, 0, 0, _ERRNO | _ENOSYS)])
    program += [(_AT_LEAST, 0, 1, _FIRST_UNKNOWN), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    for number in _numbers([_DENIED, _METADATA] if host_files_in_reach else [_DENIED]):
        program += _when(number, [_REFUSE])
    own = [(_EQUAL, 1, 0, os.getpid()), _REFUSE, (_RETURN, 0, 0, _ALLOW)]
    for number in _numbers([_OWN_PROCESS_ONLY]):
        # prlimit64 means the caller by 0; kill(0) would mean the process group.
        allowed = [(_EQUAL, 2, 0, 0)] if number in _OWN_PROCESS_ONLY["prlimit64"] else []
        program += _when(number, [(_LOAD, 0, 0, _FIRST_ARGUMENT), *allowed, *own])
    # A thread, in the namespaces of its process; anything else that clone makes is refused.
    thread = [(_ANY_BIT, 1, 0, _CLONE_ANY_NAMESPACE), (_ANY_BIT, 1, 0, _CLONE_THREAD), _REFUSE]
    clone = [(_LOAD, 0, 0, _FIRST_ARGUMENT), *thread, (_RETURN, 0, 0, _ALLOW)]
    program += _when(_CLONE[_COLUMN[jail.MACHINE]], clone)
    # A run that outlived its server would outlive its deadline.
    keep = [(_EQUAL, 0, 1, jail.PR_SET_PDEATHSIG), _REFUSE, (_RETURN, 0, 0, _ALLOW)]
    program += _when(_PRCTL[_COLUMN[jail.MACHINE]], [(_LOAD, 0, 0, _FIRST_ARGUMENT), *keep])
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _when(number: int, then: list[_Line]) -> list[_Line]:
    """`then`, which ends in a return, for one system call; the next rule for the others."""
    return [(_EQUAL, 0, len(then), number), *then]


def _numbers(tables: Iterable[dict[str, tuple[int | None, int | None]]]) -> list[int]:
    column = _COLUMN[jail.MACHINE]
    return [number for table in tables for numbers in table.values() if (number := numbers[column]) is not None]
