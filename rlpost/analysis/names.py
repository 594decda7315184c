"""What versions are called where their whole paths do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath


def printable(place: str) -> str:
    """With what is no UTF-8 in a path spelled out, so that it can stand in any file."""
    return place.encode("utf-8", "backslashreplace").decode()


def short_names(places: Sequence[str]) -> list[str]:
    """The ends of paths, as long as it takes to tell them apart; a place given twice is numbered.

    Example:
        short_names(["runs/a/exports/math", "runs/b/exports/math"]) == ["a/exports/math", "b/exports/math"]
    """
    parts = [PurePath(printable(place)).parts or (place,) for place in places]
    longest = max((len(part) for part in parts), default=1)
    distinct = len(set(parts))
    depth = next((d for d in range(1, longest) if len({part[-d:] for part in parts}) == distinct), longest)
    names = ["/".join(part[-depth:]).replace("//", "/") for part in parts]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]
