"""The trusted side of tests that are more than literal comparisons: it runs the data set's source, never the candidate's.

Names which the tests use and nobody trusted defines are proxies: a call goes to the candidate's process by its channel
and comes back as a plain value. What has no plain form stays there as a `Remote`, which equals nothing.

Request: {"prelude", "setup", "tests": [source], "remote": [names], "modules": [names]}; replies, under its nonce:
{"test": index, "passed": bool, "detail": str} for each test in order, or {"broken": str}, which is the data's fault.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import socket
import sys
import types
from collections.abc import Iterator
from typing import Any

from reward.child import wire


class CandidateError(Exception):
    """The candidate raised an exception that is not a built-in one, or is gone."""


class JudgeError(BaseException):
    """The tests ask for something this judge cannot do. Not an Exception: no test may swallow it."""


class Remote:
    """A name or an object of the candidate's process."""

    __slots__ = ("_claim", "_peer", "_target")

    def __init__(self, peer: _Peer, target: str | int, claim: bool = True) -> None:
        self._peer = peer
        self._target = target
        self._claim = claim

    def __call__(self, *args: object, **kwargs: object) -> Any:
        encoded = [self._peer.encode(arg) for arg in args]
        return self._peer.ask(["call", self._target, encoded, {k: self._peer.encode(v) for k, v in kwargs.items()}])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask(["get", self._target, name])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._peer.ask(["items", self._target]))

    def __bool__(self) -> bool:
        return self._claim

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return id(self)


class _Peer:
    """The channel to the candidate, as questions and answers."""

    def __init__(self, channel: wire.Channel) -> None:
        self._channel = channel

    def ask(self, request: list[Any]) -> Any:
        nonce = os.urandom(wire.NONCE_BYTES)
        try:
            self._channel.send(nonce, json.dumps(request).encode())
            echoed, payload = self._channel.recv()
            reply = wire.loads(payload)
            if echoed != nonce or not isinstance(reply, dict):
                raise wire.WireError("an answer to no question")
            if "raised" not in reply:
                return wire.decode(reply.get("value"), self._remote)
            name, message = str(reply["raised"][0]), str(reply["raised"][1])
        except (wire.WireError, LookupError) as error:
            raise CandidateError(f"no answer from the program: {error}") from error
        kind = getattr(builtins, name, None)
        # StopIteration would end a loop of the test early, and whatever the test had left to check with it.
        unsafe = UnicodeError | StopIteration | StopAsyncIteration
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, unsafe):
            raise kind(message)
        raise CandidateError(message)

    def encode(self, value: object) -> Any:
        return wire.encode(value, self._reference)

    def _reference(self, value: object) -> list[Any]:
        if type(value) is not Remote:
            raise JudgeError(f"a test passes a {type(value).__name__}, which cannot be sent to another process")
        return ["ref", value._target]

    def _remote(self, tree: list[Any]) -> Remote:
        match tree:
            case ["o", int(number), bool(claim), str()]:
                return Remote(self, number, claim)
        raise wire.WireError(f"unknown tag {tree[0]!r}")


def run(sockets: list[socket.socket]) -> None:
    channel, peer = wire.Channel(sockets[0]), _Peer(wire.Channel(sockets[1]))
    nonce, payload = channel.recv()
    request = json.loads(payload)

    def reply(message: dict[str, Any]) -> None:
        channel.send(nonce, json.dumps(message).encode())

    module = types.ModuleType("judge")
    sys.modules["judge"] = module
    namespace = module.__dict__
    try:
        namespace |= {name: importlib.import_module(name) for name in request["modules"]}
        exec(compile(request["prelude"], "<prelude>", "exec", dont_inherit=True, optimize=0), namespace)
        namespace |= {name: Remote(peer, name) for name in request["remote"]}
        exec(compile(request["setup"], "<setup>", "exec", dont_inherit=True, optimize=0), namespace)
        tests = [compile(test, "<test>", "exec", dont_inherit=True, optimize=0) for test in request["tests"]]
    except BaseException as error:  # noqa: BLE001 - trusted source that does not run is an answer for the parent
        reply({"broken": f"the setup fails: {type(error).__name__}: {error}"})
        return
    for index, test in enumerate(tests):
        passed, detail = True, ""
        try:
            exec(test, namespace)
        except JudgeError as error:
            reply({"broken": str(error)})
            return
        except BaseException as error:  # noqa: BLE001 - what a returned value provokes is a failed test
            passed, detail = False, f"{type(error).__name__}: {error}"[:300]
        reply({"test": index, "passed": passed, "detail": detail})
