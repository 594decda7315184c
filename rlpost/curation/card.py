"""What was left out and why, as it happens, and the data card that it comes to."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from rich.table import Table

MAX_EXAMPLES = 3
MAX_QUOTE = 120
LENGTH_EDGES = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Words of a problem."""


@dataclass(slots=True)
class Ledger:
    """Counts problems, and writes those that are left out to a file: none is lost."""

    filters: Mapping[str, str]
    """Definitions by name, in order."""
    left_out: IO[str]
    rows: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    taken: dict[str, Counter[str]] = field(default_factory=dict)
    """Of each filter, by source."""
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)
    """Index into LENGTH_EDGES: of the first edge that a problem's words do not reach."""

    def leave_out(self, source: str, row: int, name: str, problem_id: str, problem: str, detail: str) -> None:
        """By the filter `name`, for the reason `detail`."""
        assert name in self.filters
        self.taken.setdefault(name, Counter())[source] += 1
        line = {"id": problem_id, "source": source, "row": row, "filter": name, "detail": detail}
        self.left_out.write(json.dumps(line, ensure_ascii=False) + "\n")
        examples = self.examples.setdefault(name, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append({"id": problem_id, "problem": shortened(problem), "detail": shortened(detail)})

    def keep(self, source: str, num_words: int) -> None:
        self.kept[source] += 1
        self.lengths[sum(num_words >= edge for edge in LENGTH_EDGES)] += 1

    def figures(self) -> dict[str, Any]:
        """Everything that was counted, as plain data."""
        return {
            "rows": dict(self.rows),
            "filters": [
                {
                    "name": name,
                    "definition": definition,
                    "left_out": {source: self.taken.get(name, Counter())[source] for source in self.rows},
                    "examples": self.examples.get(name, []),
                }
                for name, definition in self.filters.items()
            ],
            "kept": {source: self.kept[source] for source in self.rows},
            "words": {label: self.lengths[index] for index, label in enumerate(_length_labels())},
        }


def shortened(text: str) -> str:
    """On one line, at most MAX_QUOTE characters."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_QUOTE else line[: MAX_QUOTE - 3] + "..."


def _length_labels() -> list[str]:
    first, last = LENGTH_EDGES[0], LENGTH_EDGES[-1]
    between = [f"{low} to {high - 1}" for low, high in itertools.pairwise(LENGTH_EDGES)]
    return [f"below {first}", *between, f"{last} and more"]


def render(figures: Mapping[str, Any]) -> Table:
    """Rows in, what each filter left out, rows kept: of each source, and of all."""
    table = Table(box=None, padding=(0, 1))
    table.add_column("")
    for source in (*figures["rows"], *(["all"] if len(figures["rows"]) > 1 else [])):
        table.add_column(source, justify="right")
    for name, counts in _lines(figures):
        table.add_row(name, *counts)
    return table


def markdown(card: Mapping[str, Any]) -> str:
    """The card for people; `card.json` is the same for programs."""
    sources = list(card["rows"])
    columns = [*sources, *(["all"] if len(sources) > 1 else [])]
    lines = [
        f"# {card['name']}",
        "",
        f"{sum(card['kept'].values()):,} {card['task']} problems of {sum(card['rows'].values()):,}, curated on {card['date']} by"
        f" `rlpost data` (rlpost {card['versions']['rlpost']}). Rows left out are in `left_out.jsonl`, each with its filter.",
        "",
        f"| | {' | '.join(columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
        *(f"| {name} | {' | '.join(counts)} |" for name, counts in _lines(card)),
        "",
        "## Filters, in the order in which they are asked",
        "",
    ]
    for item in card["filters"]:
        lines.append(f"- **{item['name']}**: {item['definition']}.")
        lines += [f"  - `{e['id']}`: {_code(e['problem'])} ({_code(e['detail'])})" for e in item["examples"]]
    lines += ["", "## Lengths of the problems kept", "", "| words | problems |", "| --- | ---: |"]
    lines += [f"| {label} | {count:,} |" for label, count in card["words"].items()]
    if card.get("mutants"):
        lines += ["", "## Mutants of reference solutions", "", *(f"- {k}: {v}" for k, v in card["mutants"].items())]
    lines += ["", "## Inputs and outputs", ""]
    for kind in ("source", "against"):
        lines += [f"- {kind} `{name}`: {_facts(facts)}" for name, facts in card[kind].items()]
    lines += [f"- `{name}`: sha256 {digest}" for name, digest in card["outputs"].items()]
    lines += ["", "## Settings", "", "```json", json.dumps(card["settings"], indent=2), "```", ""]
    lines += [f"Versions: {', '.join(f'{name} {version}' for name, version in card['versions'].items())}."]
    return "\n".join(lines) + "\n"


def _lines(figures: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    named = [("rows", figures["rows"])]
    named += [(item["name"], item["left_out"]) for item in figures["filters"]]
    named.append(("kept", figures["kept"]))
    lines = []
    for name, counts in named:
        values = list(counts.values())
        lines.append((name, [f"{value:,}" for value in [*values, *([sum(values)] if len(values) > 1 else [])]]))
    return lines


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"


def _facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
