"""The jobs a jailed child can run: a candidate's program, the judge of arbitrary assertions, a math comparison.

A job is one JSON frame on the channel; answers are frames {"nonce": ..., "kind": ..., ...}. A frame is a 4-byte big-endian
length and that many bytes. Everything a candidate's process writes is a claim about values, never a verdict.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

from reward.child import codec

MAX_FRAME_BYTES = 1 << 20
PEER_FD = 4
_WARM = (
    "abc", "array", "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions",
    "functools", "heapq", "io", "itertools", "json", "math", "operator", "queue", "random", "re", "statistics", "string",
    "sys", "textwrap", "threading", "time", "typing",
)  # fmt: skip

# Kept from before any candidate ran; a candidate that replaces them harms only its own process.
_read, _write, _exit, _dumps, _loads, _urandom = os.read, os.write, os._exit, json.dumps, json.loads, os.urandom


def preload(extra: str) -> None:
    """Imports what most runs need, so that a fork has it for nothing; `extra` is "" or "math"."""
    for name in _WARM:
        __import__(name)
    if extra == "math":
        from reward.child import math_job

        math_job.warm_up()


class PeerClosedError(Exception):
    """The other end of a channel is gone."""


def read_frame(fd: int, max_bytes: int = 16 * MAX_FRAME_BYTES) -> Any:
    size = struct.unpack(">I", _read_exactly(fd, 4))[0]
    if size > max_bytes:
        raise ValueError(f"frame of {size} bytes")
    return _loads(_read_exactly(fd, size))


def _read_exactly(fd: int, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = _read(fd, min(size - len(parts), 1 << 16))
        if not part:
            raise PeerClosedError
        parts += part
    return bytes(parts)


def write_frame(fd: int, value: Any) -> None:
    body = _dumps(value).encode()
    view = memoryview(struct.pack(">I", len(body)) + body)
    while view:
        view = view[_write(fd, view) :]


def run_job(channel: int) -> None:
    """Reads the job from `channel` and runs it; the caller ends the process afterwards."""
    job = read_frame(channel)
    # All runs fork from one random state: without this a candidate could foresee the inputs a judge draws.
    random.seed(_urandom(16))
    send = _sender(channel, job["nonce"])
    send("ready")
    _JOBS[job["kind"]](job, send)


def _sender(channel: int, nonce: str) -> Callable[..., None]:
    def send(kind: str, **fields: Any) -> None:
        frame = {"nonce": nonce, "kind": kind, **fields}
        write_frame(channel, frame)

    return send


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:  # noqa: BLE001 - a candidate's exception may raise in __str__
        return "exception without a text"


def _encode_small(value: Any) -> list[Any]:
    tagged = codec.encode(value)
    if len(_dumps(tagged)) > MAX_FRAME_BYTES // 2:
        raise codec.TooLargeError(f"value of more than {MAX_FRAME_BYTES // 2} bytes")
    return tagged


def _candidate_job(job: dict[str, Any], send: Callable[..., None]) -> None:
    """Runs the solution and the setup, then evaluates each call; then serves the judge's calls, if there is a judge."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    namespace = module.__dict__
    try:
        for source, name in ((job["solution"], "<solution>"), (job["setup"], "<setup>")):
            exec(compile(source, name, "exec", dont_inherit=True), namespace)
    except BaseException as error:  # noqa: BLE001 - the candidate may raise anything, SystemExit included
        send("failed", detail=_describe(error))
        return
    for index, call in enumerate(job["calls"]):
        try:
            code = compile(call, "<test>", "eval", dont_inherit=True)
            value = _encode_small(eval(code, namespace))
        except BaseException as error:  # noqa: BLE001 - as above
            send("value", index=index, error=_describe(error))
        else:
            send("value", index=index, value=value)
    if job["serve"]:
        _serve_calls(namespace)


def _serve_calls(namespace: dict[str, Any]) -> None:
    while True:
        try:
            call = read_frame(PEER_FD, MAX_FRAME_BYTES)
        except PeerClosedError:
            return
        try:
            function = namespace[call["name"]]
            value = _encode_small(function(*codec.decode(call["args"]), **codec.decode(call["kwargs"])))
        except BaseException as error:  # noqa: BLE001 - as above
            write_frame(PEER_FD, {"error": type(error).__name__, "detail": _describe(error)})
        else:
            write_frame(PEER_FD, {"value": value})


class CandidateError(Exception):
    """The candidate raised something that is not a built-in exception, or its process is gone."""


def _proxy(name: str) -> Callable[..., Any]:
    """A stand-in, in the judge, for the candidate's function of that name: plain values out, plain values back."""

    def call(*args: Any, **kwargs: Any) -> Any:
        request = {"name": name, "args": codec.encode(list(args)), "kwargs": codec.encode(kwargs)}
        try:
            write_frame(PEER_FD, request)
            answer = read_frame(PEER_FD, MAX_FRAME_BYTES)
        except (PeerClosedError, BrokenPipeError, ConnectionResetError):
            raise CandidateError("the candidate's process ended") from None
        if type(answer) is dict and "value" in answer:
            return codec.decode(answer["value"])
        kind = getattr(builtins, str(answer["error"]), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(answer["detail"])
        raise CandidateError(answer["detail"])

    call.__name__ = call.__qualname__ = name
    return call


def _judge_job(job: dict[str, Any], send: Callable[..., None]) -> None:
    """Runs trusted test source; the functions under test are proxies of the candidate's process."""
    module = types.ModuleType("judge")
    sys.modules["judge"] = module
    namespace = module.__dict__
    for source in (job["prelude"], job["setup"]):
        exec(compile(source, "<setup>", "exec", dont_inherit=True), namespace)
    namespace.update({name: _proxy(name) for name in job["proxies"]})
    for name in job["modules"]:
        namespace.setdefault(name, __import__(name))
    for index, test in enumerate(job["tests"]):
        try:
            exec(compile(test, "<test>", "exec", dont_inherit=True), namespace)
        except AssertionError:
            send("judged", index=index, passed=False, detail="assertion failed")
        except Exception as error:  # noqa: BLE001 - whatever a returned value provokes is a failed test
            send("judged", index=index, passed=False, detail=_describe(error))
        else:
            send("judged", index=index, passed=True)


def _stdio_job(job: dict[str, Any], send: Callable[..., None]) -> None:
    """Runs a whole program on descriptors 4 (input) and 5 (output); what it wrote is read by the parent."""
    os.dup2(4, 0)
    os.dup2(5, 1)
    os.closerange(4, 8)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - lives as long as the process
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as above
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(job["solution"], "<solution>", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        pass
    except BaseException as error:  # noqa: BLE001 - as above
        send("failed", detail=_describe(error))
    finally:
        sys.stdout.flush()
    send("done")


def _math_job(job: dict[str, Any], send: Callable[..., None]) -> None:
    from reward.child import math_job

    send("math", **math_job.compare(job["gold"], job["answer"]))


_JOBS: dict[str, Callable[[dict[str, Any], Callable[..., None]], None]] = {
    "candidate": _candidate_job, "judge": _judge_job, "stdio": _stdio_job, "math": _math_job,
}  # fmt: skip
