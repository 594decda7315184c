"""Emptying a folder that a hostile program has filled, and measuring it."""

from __future__ import annotations

import os
import sys

MAX_ENTRIES = 4096


def empty(folder: str) -> None:
    """Remove everything below `folder`, however deep, whatever its names and modes. Nobody may be writing to it.

    A directory's own directories move up beside it before it is removed: no path gets long, and nothing recurses.
    Raise OSError for what cannot be removed.
    """
    moved = 0
    while entries := [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(folder)]:
        for path, is_directory in entries:
            if not is_directory:
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for child in [*os.scandir(path)]:
                if child.is_dir(follow_symlinks=False):
                    moved += 1
                    os.rename(child.path, os.path.join(folder, f"{os.urandom(8).hex()}-{moved}"))
                else:
                    os.unlink(child.path)
            os.rmdir(path)


def bytes_below(folder: str) -> int:
    """Disk space of all files below; more than any limit where there are more than MAX_ENTRIES, or one cannot be read."""
    total, num_entries, folders = 0, 0, [folder]
    while folders:
        try:
            entries = [*os.scandir(folders.pop())]
            num_entries += len(entries)
            if num_entries > MAX_ENTRIES:
                return sys.maxsize
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            continue  # what vanishes meanwhile takes no space
        except OSError:
            return sys.maxsize
    return total
