"""The untrusted side of a code run: execute the program, then answer questions with encoded values.

The code under test shares this process and can do what it likes to it: forge replies, patch this module, exit. None of
that can turn a wrong answer right, because this process never holds an expected value.

The first request is {"provided", "program", "setup", "name"}, answered twice under its nonce: {"compiled": bool, "error"}
and, if it compiled, {"loaded": bool, "error"}. Then come ["eval", source], ["call", target, args, kwargs] (a target is a
global name or a handle), ["method", class, method, args] on a fresh object, ["get", target, attribute] and
["items", target], each answered {"value": tree} or {"raised": [type name, text]}. With a second descriptor the program is a
script: it gets {"stdin"} and writes its standard output to the descriptor, and nothing is asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import types
from typing import Any

from reward.child import wire

_MAX_ITEMS = 1_000_000


class _Session:
    """The candidate's module, and the objects it has handed out by number."""

    def __init__(self, channel: wire.Channel) -> None:
        self.channel = channel
        self.module = types.ModuleType("solution")
        self.handles: list[Any] = []

    def load(self, nonce: bytes, request: dict[str, Any]) -> bool:
        name = request["name"]
        self.module.__dict__["__name__"] = name
        try:
            program = compile(request["program"], "<program>", "exec", dont_inherit=True)
            setup = compile(request["setup"], "<setup>", "exec", dont_inherit=True)
        except Exception as error:  # noqa: BLE001 - any failure to compile is the program's
            self._reply(nonce, {"compiled": False, "error": describe(error)})
            return False
        self._reply(nonce, {"compiled": True, "error": ""})
        # dataclasses and typing look a class up through sys.modules.
        sys.modules[name] = self.module
        try:
            exec(request["provided"], self.module.__dict__)
            exec(program, self.module.__dict__)
            exec(setup, self.module.__dict__)
        except BaseException as error:  # noqa: BLE001 - SystemExit included: a program may not end its own run
            self._reply(nonce, {"loaded": False, "error": describe(error)})
            return False
        self._reply(nonce, {"loaded": True, "error": ""})
        return True

    def answer(self, request: list[Any]) -> dict[str, Any]:
        try:
            return {"value": wire.encode(self._evaluate(request), self._hand_out)}
        except BaseException as error:  # noqa: BLE001 - whatever the program raises is its answer
            return {"raised": [type(error).__name__, describe(error)]}

    def _evaluate(self, request: list[Any]) -> Any:
        match request:
            case ["eval", source]:
                return eval(compile(source, "<test>", "eval", dont_inherit=True), self.module.__dict__)
            case ["call", target, args, kwargs]:
                positional = [wire.decode(arg, self._resolve) for arg in args]
                named = {key: wire.decode(arg, self._resolve) for key, arg in kwargs.items()}
                return self._target(target)(*positional, **named)
            case ["method", target, method, args]:
                return getattr(self._target(target)(), method)(*[wire.decode(arg, self._resolve) for arg in args])
            case ["get", target, attribute]:
                return getattr(self._target(target), attribute)
            case ["items", target]:
                return [item for _, item in zip(range(_MAX_ITEMS), self._target(target), strict=False)]
        raise ValueError("unknown request")

    def _target(self, target: str | int) -> Any:
        if isinstance(target, int):
            return self.handles[target]
        if target not in self.module.__dict__:
            raise NameError(f"name {target!r} is not defined")
        return self.module.__dict__[target]

    def _resolve(self, tree: list[Any]) -> Any:
        return self._target(tree[1])

    def _hand_out(self, value: Any) -> list[Any]:
        self.handles.append(value)
        try:
            claim = bool(value)
        except Exception:  # noqa: BLE001 - as an exception in `assert f(x)`: not a pass
            claim = False
        return ["o", len(self.handles) - 1, claim, type(value).__name__]

    def _reply(self, nonce: bytes, reply: dict[str, Any]) -> None:
        self.channel.send(nonce, json.dumps(reply).encode())


def run(sockets: list[socket.socket]) -> None:
    channel = wire.Channel(sockets[0])
    session = _Session(channel)
    nonce, payload = channel.recv()
    request = json.loads(payload)
    if "stdin" in request:
        _redirect_stdio(request["stdin"], sockets[1])
        with contextlib.suppress(BaseException):
            session.load(nonce, request)
            sys.stdout.flush()
        return
    if not session.load(nonce, request):
        return
    while True:
        try:
            nonce, payload = channel.recv()
        except wire.WireError:
            return
        reply = json.dumps(session.answer(json.loads(payload))).encode()
        if len(reply) > wire.MAX_FRAME_BYTES:
            reply = json.dumps({"raised": ["OverflowError", "the returned value is too large"]}).encode()
        channel.send(nonce, reply)


def describe(error: BaseException) -> str:
    """One short line; the exception's own text may be hostile code."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # noqa: BLE001 - a __str__ of the program's making
        return "an exception without a text"


def _redirect_stdio(stdin: str, output: socket.socket) -> None:
    # A file without a name in the scratch folder: the program can seek in it, as in a redirected file.
    source = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
    data = memoryview(stdin.encode())
    while data:
        data = data[os.write(source, data) :]
    os.lseek(source, 0, os.SEEK_SET)
    os.dup2(source, 0)
    os.dup2(output.fileno(), 1)
    os.close(source)
    output.close()
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - lives as long as the process
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as above
