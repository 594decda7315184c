"""How values cross a process boundary: framed messages and a typed encoding of plain Python values.

Both ends treat what arrives as hostile: a frame has a size limit, a value is JSON with type tags (never pickle), and only
exact built-in and standard-library value types have an encoding. Anything else, a subclass of int included, stays behind
as a numbered handle, so no `__eq__`, `__repr__` or `__hash__` of the sender ever runs at the receiver.
"""

from __future__ import annotations

import datetime
import json
import re
import socket
import struct
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

NONCE_BYTES = 16
MAX_FRAME_BYTES = 4 * 2**20
MAX_DEPTH = 150
_HEADER = struct.Struct(f">I{NONCE_BYTES}s")
_SAFE_INT = 2**53
_HEX = re.compile(r"-?0x[0-9a-f]+\Z")
_DATES: dict[str, Any] = {"date": datetime.date, "time": datetime.time, "datetime": datetime.datetime}
_SEQUENCE_TAGS: dict[type, str] = {list: "l", tuple: "t", deque: "q", set: "s", frozenset: "z"}
_DICT_TYPES = (dict, OrderedDict, defaultdict, Counter)
_MAX_EXACT_CHARS = 400
"""Longer fractions and decimals are compared as written: a short text can stand for a number of any size."""
_KEYS, _ITEMS, _VALUES = type({}.keys()), type({}.items()), type({}.values())


class WireError(Exception):
    """The peer sent something that is not a frame or not a value."""


class ChannelClosedError(WireError):
    """The peer is gone."""


class Channel:
    """Framed messages over one stream socket. A deadline (time.monotonic seconds) bounds a whole frame, not one read."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def send(self, nonce: bytes, payload: bytes, deadline: float | None = None) -> None:
        """Raise TimeoutError at the deadline, ChannelClosedError when nobody reads."""
        self._arm(deadline)
        try:
            self._sock.sendall(_HEADER.pack(len(payload), nonce) + payload)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosedError("the peer closed the channel") from error

    def recv(self, deadline: float | None = None) -> tuple[bytes, bytes]:
        """One (nonce, payload). Raise TimeoutError, ChannelClosedError, or WireError for a frame over MAX_FRAME_BYTES."""
        size, nonce = _HEADER.unpack(self._take(_HEADER.size, deadline))
        if size > MAX_FRAME_BYTES:
            raise WireError(f"a frame of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
        return nonce, self._take(size, deadline)

    def _take(self, size: int, deadline: float | None) -> bytes:
        while len(self._buffer) < size:
            self._arm(deadline)
            try:
                chunk = self._sock.recv(1 << 16)
            except ConnectionResetError as error:
                raise ChannelClosedError("the peer closed the channel") from error
            if not chunk:
                raise ChannelClosedError("the peer closed the channel")
            self._buffer += chunk
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _arm(self, deadline: float | None) -> None:
        if deadline is None:
            return
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("the deadline has passed")
        self._sock.settimeout(remaining_s)


def encode(value: Any, handle: Callable[[Any], list[Any]], depth: int = 0) -> Any:
    """Value as a JSON tree; `handle` makes the tree of what has no encoding. Raise WireError past MAX_DEPTH."""
    if depth > MAX_DEPTH:
        raise WireError(f"a value nested deeper than {MAX_DEPTH}")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_SAFE_INT < value < _SAFE_INT else ["i", hex(value)]
    if kind is float:
        return ["f", value.hex()]
    if kind in _SEQUENCE_TAGS:
        return [_SEQUENCE_TAGS[kind], [encode(item, handle, depth + 1) for item in value]]
    if kind in _DICT_TYPES:
        return ["d", [[encode(k, handle, depth + 1), encode(v, handle, depth + 1)] for k, v in dict.items(value)]]
    return _encode_rare(value, kind, handle, depth)


def _encode_rare(value: Any, kind: type, handle: Callable[[Any], list[Any]], depth: int) -> Any:
    if kind is bytes or kind is bytearray:
        return ["b", value.hex()]
    if kind is complex:
        return ["c", value.real.hex(), value.imag.hex()]
    if kind is range:
        return ["r", *(encode(part, handle) for part in (value.start, value.stop, value.step))]
    if kind is Decimal:
        return ["D", str(value)]
    if kind is Fraction:
        return ["F", hex(value.numerator), hex(value.denominator)]
    if kind in (datetime.date, datetime.time, datetime.datetime):
        return ["T", kind.__name__, value.isoformat()]
    if kind is datetime.timedelta:
        return ["L", value.days, value.seconds, value.microseconds]
    if kind is _KEYS or kind is _ITEMS:
        return ["s", [encode(item, handle, depth + 1) for item in value]]
    if kind.__bases__ == (tuple,) and isinstance(getattr(kind, "_fields", None), tuple):
        # A named tuple: its entries as the tuple stores them, whatever else the class defines.
        return ["t", [encode(item, handle, depth + 1) for item in tuple.__iter__(value)]]
    return handle(value)


def decode(tree: Any, handle: Callable[[list[Any]], Any]) -> Any:
    """The value of a tree; `handle` resolves the tags it does not know. Raise WireError for a malformed tree.

    Builds sets and dicts of the sender's choice, whose hashing an adversary can make slow: call it where a hang is
    somebody else's deadline, and compare with `canonical` elsewhere.
    """
    if tree is None or isinstance(tree, bool | str | int):
        return tree
    try:
        match tree:
            case ["i", str(digits)]:
                return _int(digits)
            case ["f", str(digits)]:
                return float.fromhex(digits)
            case ["l", list(items)]:
                return [decode(item, handle) for item in items]
            case ["t", list(items)]:
                return tuple(decode(item, handle) for item in items)
            case ["q", list(items)]:
                return deque(decode(item, handle) for item in items)
            case ["s", list(items)]:
                return {decode(item, handle) for item in items}
            case ["z", list(items)]:
                return frozenset(decode(item, handle) for item in items)
            case ["d", list(pairs)]:
                return {decode(key, handle): decode(value, handle) for key, value in pairs}
            case ["b", str(digits)]:
                return bytes.fromhex(digits)
            case ["c", str(real), str(imag)]:
                return complex(float.fromhex(real), float.fromhex(imag))
            case ["r", start, stop, step]:
                return range(decode(start, handle), decode(stop, handle), decode(step, handle))
            case ["D", str(digits)]:
                return Decimal(digits)
            case ["F", str(numerator), str(denominator)]:
                return Fraction(_int(numerator), _int(denominator))
            case ["T", "date" | "time" | "datetime" as name, str(text)]:
                return _DATES[name].fromisoformat(text)
            case ["L", int(days), int(seconds), int(microseconds)]:
                return datetime.timedelta(days, seconds, microseconds)
            case [str(tag), *rest]:
                return handle([tag, *rest])
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise WireError(f"malformed value: {error}") from error
    raise WireError("malformed value")


def canonical(tree: Any, depth: int = 0) -> str:
    """A text that two trees share exactly when their values are equal in Python (`1 == 1.0 == True`, list != tuple).

    Linear but for sorting, and it neither hashes numbers nor calls anything of the sender's. A handle and NaN equal
    nothing: their text holds a "!" and no plain value's does. Raise WireError for a malformed tree.
    """
    if depth > MAX_DEPTH:
        raise WireError(f"a value nested deeper than {MAX_DEPTH}")
    if tree is None:
        return "N"
    if isinstance(tree, str):
        return json.dumps(tree).replace("!", "\\u0021")
    if isinstance(tree, int):
        return f"n{int(tree):x}"
    try:
        match tree:
            case ["i", str(digits)]:
                return f"n{_int(digits):x}"
            case ["f", str(digits)]:
                return _real(float.fromhex(digits))
            case ["l" | "t" | "q" as tag, list(items)]:
                return f"{tag}({','.join([canonical(item, depth + 1) for item in items])})"
            case ["s" | "z", list(items)]:
                return f"s({','.join(sorted({canonical(item, depth + 1) for item in items}))})"
            case ["d", list(pairs)]:
                parts = sorted({f"{canonical(k, depth + 1)}:{canonical(v, depth + 1)}" for k, v in pairs})
                return f"d({','.join(parts)})"
        return _canonical_rare(tree)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise WireError(f"malformed value: {error}") from error


def _canonical_rare(tree: Any) -> str:
    match tree:
        case ["c", str(real), str(imag)]:
            imaginary = float.fromhex(imag)
            return _real(float.fromhex(real)) + (f"+{_real(imaginary)}j" if imaginary else "")
        case ["F", str(numerator), str(denominator)]:
            if len(numerator) + len(denominator) > _MAX_EXACT_CHARS:
                return f"F{_int(numerator):x}/{_int(denominator):x}"
            return _real(Fraction(_int(numerator), _int(denominator)))
        case ["D", str(digits)]:
            if len(digits) > _MAX_EXACT_CHARS:
                return f"D{json.dumps(digits)}"
            number = Decimal(digits)
            # 1e999999999 is eleven bytes here and half a gigabyte as an integer.
            huge = number.is_finite() and number and abs(number.adjusted()) >= _MAX_EXACT_CHARS
            return f"D{number}" if huge else _real(number)
        case ["r", start, stop, step]:
            return f"r{canonical(start)},{canonical(stop)},{canonical(step)}"
        case ["b", str(digits)]:
            return f"b{bytes.fromhex(digits).hex()}"
        case ["T", "date" | "time" | "datetime" as name, str(text)]:
            return f"T{name}{_DATES[name].fromisoformat(text).isoformat()}"
        case ["L", int(days), int(seconds), int(microseconds)]:
            return f"L{days},{seconds},{microseconds}"
        case [str(), *_]:
            return "!"
    raise WireError("malformed value")


def equals_nothing(canonical_text: str) -> bool:
    """Whether NaN or a handle is somewhere in the value."""
    return "!" in canonical_text


def truth(tree: Any) -> bool:
    """`bool(value)` of a tree; a handle (tag "o") carries the sender's own claim, which `assert f(x)` asks for."""
    match tree:
        case ["o", int(), bool(claim), str()]:
            return claim
        case ["l" | "t" | "q" | "s" | "z" | "d", list(items)]:
            return bool(items)
        case ["i" | "f" | "c" | "F" | "D", *_]:
            return canonical(tree) != "n0"
        case ["b" | "r" | "L", *_]:
            return bool(decode(tree, _refuse))
        case ["T", *_]:
            return True
        case list():
            raise WireError("malformed value")
    return bool(tree)


def loads(payload: bytes) -> Any:
    """JSON of hostile bytes. Raise WireError when it is not JSON or too deep."""
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON: {error}") from error


def _refuse(tree: list[Any]) -> Any:
    raise WireError(f"unknown tag {tree[0]!r}")


def _int(digits: str) -> int:
    if not _HEX.match(digits):
        raise ValueError(f"not a hexadecimal integer: {digits[:40]!r}")
    return int(digits, 16)


def _real(number: float | Fraction | Decimal) -> str:
    if number != number:
        return "!nan"
    if number in (float("inf"), float("-inf")):
        return f"n{float(number)}"
    numerator, denominator = number.as_integer_ratio()
    return f"n{numerator:x}" if denominator == 1 else f"n{numerator:x}/{denominator:x}"
