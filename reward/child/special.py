"""Answers with a notation of their own: choices, times of day, dates, numerals with a base."""

from __future__ import annotations

import re

from reward.child.notation import canonical, trim, unbox, unwrapped
from reward.child.tables import BASE_WORDS, MONTHS
from reward.child.tree import Node, Unreadable, based

_BASED = re.compile(
    r"\(?([0-9A-Z]+)\)?\s*(?:_\s*\{?\s*(?:base\s*)?(\d{1,2}|[a-z]{3,8})\s*\}?"
    r"|[(,]?\s*(?:in\s+)?base[\s-]*\{?(\d{1,2}|[a-z]{3,8})\}?\s*\)?)"
)


def based_numeral(text: str) -> Node | None:
    """The numeral of `101_2`, `101 base 2`, `1A_{16}`; None for another text or a digit that the base does not have."""
    match = _BASED.fullmatch(text.strip("() ") if text.count("(") == 1 and text.startswith("(") else text)
    if match is None:
        return None
    name = match[2] or match[3]
    base = int(name) if name.isdigit() else BASE_WORDS.get(name, 0)
    if base <= 10 and not re.search(r"\d", match[1]):
        return None
    try:
        return based(match[1], base)
    except Unreadable:
        return None


def choice(raw: str) -> tuple[str, str] | None:
    """(letter, what follows) of an answer that picks an option, such as `(B)`, `B. 12`, `Option B`."""
    text = trim(unwrapped(canonical(unbox(raw)), "")).strip("* ")
    text = re.sub(r"^(?:option|choice|answer)s?\s*:?\s*", "", text, flags=re.IGNORECASE)
    if match := re.fullmatch(r"[(\[]?\s*([A-Za-z])\s*[)\]]?[.:]?", text):
        return match[1].upper(), ""
    match = re.match(r"(?:\(\s*([A-J])\s*\)|\[([A-J])\]|([A-J])\s*[).:])\s*(?=\S)(?![=^_])", text)
    return ((match[1] or match[2] or match[3]), text[match.end() :].strip()) if match else None


_TIME = re.compile(r"(\d{1,2})(?:\s*:\s*(\d{2}))?(?:\s*:\s*(\d{2}))?\s*([ap])?\.?\s*(m)?\.?", re.IGNORECASE)


def clock_time(raw: str) -> tuple[int, bool, bool] | None:
    """(seconds after midnight, whether a.m. or p.m. is stated, whether it can only be 24-hour) of a time of day."""
    text = trim(unwrapped(canonical(raw))).strip()
    match = _TIME.fullmatch(text)
    if match is None or bool(match[4]) != bool(match[5]) or not (match[2] or match[4]):
        return None
    hour, minute, second = int(match[1]), int(match[2] or 0), int(match[3] or 0)
    if hour > 24 or minute > 59 or second > 59 or (match[4] and not 1 <= hour <= 12):
        return None
    only_24_hours = not match[4] and (hour > 12 or hour == 0 or match[1].startswith("0"))
    if match[4]:
        hour = hour % 12 + (12 if match[4].lower() == "p" else 0)
    return hour * 3600 + minute * 60 + second, bool(match[4]), only_24_hours


def calendar_date(raw: str) -> tuple[int, tuple[int, ...]] | None:
    """(month, its other numbers in order of size) of a date with a month's name, or of an ISO date."""
    text = unwrapped(canonical(raw)).strip(" .")
    if match := re.fullmatch(r"(\d{4})-(\d{1,2})-(\d{1,2})", text):
        return int(match[2]), tuple(sorted((int(match[1]), int(match[3]))))
    words = re.findall(r"[A-Za-z]+|\d+", re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text.lower()))
    months = [word for word in words if len(word) >= 3 and any(name.startswith(word) for name in MONTHS)]
    numbers = [int(word) for word in words if word.isdigit() and len(word) <= 4]
    rest = [word for word in words if word not in months and not word.isdigit() and word not in ("of", "the")]
    if len(months) != 1 or not numbers or rest:
        return None
    return [name[:3] for name in MONTHS].index(months[0][:3]) + 1, tuple(sorted(numbers))
