"""No process outlives its run: a watcher ends what Ray would leave behind when the driver is killed outright.

Ray's agents notice that their raylet is gone and then try for a minute to report it to a server that is gone too.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_WATCH = """
import sys, psutil
listed = [line.split() for line in sys.stdin]
for pid, created in listed:
    try:
        process = psutil.Process(int(pid))
        if repr(process.create_time()) == created:
            process.kill()
    except psutil.NoSuchProcess:
        continue
"""


@contextmanager
def ended_with_this_process() -> Iterator[None]:
    """End every present descendant of this process once the block, or this process, is over.

    The watcher reads their ids from a pipe that only this process holds, and acts when the pipe ends.
    """
    descendants = psutil.Process().children(recursive=True)
    watcher = subprocess.Popen([sys.executable, "-c", _WATCH], stdin=subprocess.PIPE, text=True, start_new_session=True)
    assert watcher.stdin is not None
    watcher.stdin.writelines(f"{process.pid} {process.create_time()!r}\n" for process in descendants)
    watcher.stdin.flush()
    try:
        yield
    finally:
        watcher.stdin.close()
        watcher.wait()
