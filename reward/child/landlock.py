"""Landlock by ctypes: what a run may open, where there are no namespaces. Linux 6.2 or newer; no rights needed.

It does not hide names: a run can still ask whether a path exists (stat), it cannot open, list, change or create anything
outside the folders named here. https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Collection, Iterable

from reward.child import jail

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION, _PATH_BENEATH = 1, 1
_OLDEST_ABI = 3
"""The first that governs truncation: before it a run could empty the files of its user."""
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_DIR, MAKE_REG, MAKE_SYM, REFER, TRUNCATE = (1 << bit for bit in (7, 8, 12, 13, 14))
_READ = EXECUTE | READ_FILE | READ_DIR
_WRITE = WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
_OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
_DEVICES = {
    "/dev/null": READ_FILE | WRITE_FILE,
    "/dev/zero": READ_FILE,
    "/dev/urandom": READ_FILE,
    "/dev/random": READ_FILE,
}


def ruleset(readable: Iterable[str], hidden: Iterable[str], scratch: str) -> int:
    """Descriptor of the rules: `readable` without `hidden` to read, `scratch` to read and write, four devices, nothing else.

    Raises:
        OSError: the kernel has no Landlock, has it switched off, or is too old.
    """
    abi = jail.libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION)
    jail.check(abi, "landlock is not available")
    if abi < _OLDEST_ABI:
        raise OSError(f"landlock ABI {abi} does not govern truncation: Linux 6.2 or newer is needed")
    # Handled rights without a rule are refused: every file right, TCP from ABI 4, abstract sockets and signals from 6.
    files = (1 << (16 if abi >= 5 else 15)) - 1
    attributes = struct.pack("=QQQ", files, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = jail.check(jail.libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0), "landlock ruleset")
    out_of_sight = [os.path.realpath(path) for path in hidden]
    for path in readable:
        _allow_without(rules, os.path.realpath(path), out_of_sight)
    for path, access in _DEVICES.items():
        _allow(rules, path, access)
    _allow(rules, scratch, _READ | _WRITE)
    return rules


def restrict(rules: int) -> None:
    """Hold this process and all it starts to the rules, for good. Needs `jail.drop_privileges` first."""
    jail.check(jail.libc.syscall(_RESTRICT_SELF, rules, 0), "landlock_restrict_self")


def _allow_without(rules: int, path: str, hidden: Collection[str]) -> None:
    """Rules only add: a folder with something hidden below is opened entry by entry. Its names can be listed all the same."""
    if path in hidden:
        return
    if not any(other.startswith(f"{path}/") for other in hidden):
        _allow(rules, path, _READ)
        return
    _allow(rules, path, READ_DIR)
    for entry in os.scandir(path):
        # What a link leads to has rules of its own, or none.
        if not entry.is_symlink():
            _allow_without(rules, entry.path, hidden)


def _allow(rules: int, path: str, access: int) -> None:
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(beneath).st_mode):
            access &= _OF_A_FILE
        rule = struct.pack("=Qi", access, beneath)
        jail.check(jail.libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, rule, 0), f"landlock rule for {path}")
    finally:
        os.close(beneath)
