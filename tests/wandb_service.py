"""A stand-in for wandb's service on loopback, and a reader of the file that a run of it leaves: both know no wandb."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "0" * 40


@dataclass
class StoredRun:
    """What the service knows of one run."""

    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    """Per streamed file its lines by number, as a service keeps them: a later one takes the place of an earlier."""
    overwritten: list[int] = field(default_factory=list)
    complete: bool = False
    deaf: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        lines = self.lines["wandb-history.jsonl"]
        return [json.loads(lines[number]) for number in sorted(lines)]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.lines["wandb-summary.json"]
        return json.loads(lines[max(lines)]) if lines else {}


class WandbService(ThreadingHTTPServer):
    """Answers what `wandb.init`, `run.log`, artifacts and `wandb sync` ask for, and keeps all it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.hears: Callable[[dict[str, Any]], bool] = lambda row: True
        """Of the rows it is sent, those up to the first for which this is False are kept."""
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> WandbService:
        return self

    def __exit__(self, *details: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)

    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        name = query.split("(")[0].split("{")[0].split()[1]
        with self._lock:
            return _ANSWERS[name](self, given)

    def stream(self, run: str, body: dict[str, Any]) -> None:
        with self._lock:
            stored = self.runs[run]
            for name, chunk in sorted(body.get("files", {}).items()):  # history, and then the summary of it
                is_history = name == "wandb-history.jsonl"
                for number, line in enumerate(chunk["content"], start=chunk["offset"]):
                    stored.deaf |= is_history and not self.hears(json.loads(line))
                    if stored.deaf:
                        return
                    if is_history and number in stored.lines[name]:
                        stored.overwritten.append(number)
                    stored.lines[name][number] = line
            stored.complete |= body.get("complete", False)

    # -- GraphQL -------------------------------------------------------------------------------------------------------

    def viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def features(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def organization(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"entity": None}

    def resume_status(self, given: dict[str, Any]) -> dict[str, Any]:
        stored = self.runs.get(given["name"])
        if stored is None:
            return {"model": None}
        stored.deaf = False
        history = stored.history
        bucket = {
            "id": given["name"],
            "name": given["name"],
            "summaryMetrics": json.dumps(stored.summary),
            "displayName": given["name"],
            "logLineCount": 0,
            "historyLineCount": len(history),
            "eventsLineCount": len(stored.lines["wandb-events.jsonl"]),
            "historyTail": json.dumps([json.dumps(row) for row in history[-1:]]),
            "eventsTail": "[]",
            "config": json.dumps(stored.config),
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        is_new = given["name"] not in self.runs
        stored = self.runs.setdefault(given["name"], StoredRun())
        stored.config |= json.loads(given["config"] or "{}")
        bucket = {
            "id": given["name"],
            "name": given["name"],
            "displayName": given["displayName"],
            "description": None,
            "config": json.dumps(stored.config),
            "sweepName": None,
            "project": {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}},
            "historyLineCount": len(stored.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def run_files(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/{given['run']}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def artifact_type(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(given["input"])
        sequence = {"id": given["input"]["artifactCollectionName"], "latestArtifact": None}
        identity = str(len(self.artifacts))
        return {"createArtifact": {"artifact": {"id": identity, "state": "PENDING", "artifactSequence": sequence}}}

    def manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        name = f"manifest-{given['artifactID']}"
        file = {"id": name, "name": name, "displayName": name, "uploadUrl": f"{self.url}/{name}", "uploadHeaders": []}
        made = {"artifactManifest": {"id": name, "file": file}}
        return {"createArtifactManifest": made, "updateArtifactManifest": made}

    def artifact_files(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": file["name"],
                "uploadUrl": f"{self.url}/artifact-{file['artifactID']}/{file['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in given["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def commit(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}


_ANSWERS = {
    "Viewer": WandbService.viewer,
    "ServerFeaturesQuery": WandbService.features,
    "OrganizationCoreWeaveOrganizationID": WandbService.organization,
    "RunResumeStatus": WandbService.resume_status,
    "UpsertBucket": WandbService.upsert,
    "CreateRunFiles": WandbService.run_files,
    "ArtifactType": WandbService.artifact_type,
    "CreateArtifact": WandbService.artifact,
    "CreateArtifactManifest": WandbService.manifest,
    "UpdateArtifactManifest": WandbService.manifest,
    "CreateArtifactFiles": WandbService.artifact_files,
    "CommitArtifact": WandbService.commit,
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbService  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            self._reply({"data": self.server.answer(asked["query"], asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
            self._reply({})
        else:
            self._reply({})

    def do_PUT(self) -> None:
        self.server.uploads[self.path.lstrip("/")] = self._body()
        self._reply({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def records(path: Path) -> Iterator[Any]:
    """The records of a run-<id>.wandb file: LevelDB's log format after a header of 7 bytes, protocol buffers inside."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    block_bytes, full, first, last = 32768, 1, 2, 4
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if block_bytes - place % block_bytes < 7:
            place += block_bytes - place % block_bytes
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part = data[place + 7 : place + 7 + length]
        place += 7 + length
        parts = part if kind in (full, first) else parts + part
        if kind in (full, last):
            yield Record.FromString(parts)
