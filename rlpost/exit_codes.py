"""What a process of rlpost tells its shell."""

from __future__ import annotations

FAILED = 1
USAGE = 2
"""A wrong command, recipe or input: nothing was started."""
INTERRUPTED = 130
"""By Ctrl-C or SIGTERM."""
