"""Units of measure: dimension and factor of those that convert, and which words can stand beside a number."""

from __future__ import annotations

import re
from fractions import Fraction

from reward.child.tables import SHORT_UNIT_WORDS, UNITS


def known_unit(unit: str) -> tuple[str | None, Fraction]:
    """Dimension and factor of a unit such as "square feet", "cm^2", "miles per hour"; (None, 1) for other words."""
    over = re.split(r"\s+per\s+|/", unit.replace("mph", "miles per hour").replace("kph", "km per hour"))
    if len(over) == 2:
        (top, up), (bottom, down) = known_unit(over[0]), known_unit(over[1])
        return (f"{top}/{bottom}", up / down) if top and bottom else (None, Fraction(1))
    power = 1
    words = unit.split()
    if words and words[0] in ("square", "sq", "sq.", "cubic", "cu"):
        power = 2 if words[0].startswith("sq") else 3
        words = words[1:]
    if len(words) != 1:
        return None, Fraction(1)
    name, _, exponent = words[0].partition("^")
    power = int(exponent) if exponent else power
    found = UNITS.get(name) or UNITS.get(name.removesuffix("s")) or UNITS.get(name.removesuffix("es"))
    if found is None:
        return None, Fraction(1)
    return (found[0] if power == 1 else f"{found[0]}^{power}"), found[1] ** power


def looks_like_a_word(word: str) -> bool:
    """Whether letters after a number are a word, and not a product of symbols."""
    name = word.partition("/")[0]
    return len(name) > 3 or (len(name) > 1 and known_unit(name)[0] is not None) or word in SHORT_UNIT_WORDS
