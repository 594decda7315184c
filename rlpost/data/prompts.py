"""Data sets of any size as endless sequences of prompts: a prompt is made from its row when it is asked for.

P prompts of one data set, in its order.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlpost.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompts:
    """The prompts of a data set. Of each its row and a digest are held, 16 bytes; rows that lie on the disk stay there."""

    make: Callable[[int], Prompt]
    """The prompt of a row."""
    rows_P: NDArray[np.int64]
    problems_P: NDArray[np.uint64]
    """`Prompt.problem` of each, as a number."""
    content: str
    """Digest of every prompt that was loaded."""
    left_out: Mapping[str, int]
    """How many rows did not become a prompt, by reason."""

    @classmethod
    def found(
        cls, make: Callable[[int], Prompt], rows: Iterable[tuple[int, Prompt]], left_out: Mapping[str, int]
    ) -> Prompts:
        """From one pass over row numbers and what `make` makes of them; no prompt is kept."""
        rows_P, problems_P, content = array("q"), array("Q"), hashlib.blake2b(digest_size=16)
        for row, prompt in rows:
            rows_P.append(row)
            problems_P.append(int(prompt.problem or "0", 16))
            responses = (prompt.demonstration_ids, prompt.rejected_ids)
            content.update(repr((prompt.id, prompt.token_ids, prompt.reference, responses)).encode())
        return cls(
            make=make,
            rows_P=np.array(rows_P, np.int64),
            problems_P=np.array(problems_P, np.uint64),
            content=content.hexdigest(),
            left_out=left_out,
        )

    @classmethod
    def listed(cls, prompts: Sequence[Prompt], left_out: Mapping[str, int] | None = None) -> Prompts:
        """Of prompts that are in memory anyway."""
        return cls.found(prompts.__getitem__, enumerate(prompts), left_out or {})

    def __len__(self) -> int:
        return len(self.rows_P)

    def __getitem__(self, index: int) -> Prompt:
        return self.make(int(self.rows_P[index]))

    def __iter__(self) -> Iterator[Prompt]:
        return map(self.make, map(int, self.rows_P))

    @property
    def fingerprint(self) -> str:
        """Changes with any prompt, with their order, and with which of them were left out."""
        return hashlib.blake2b(self.content.encode() + self.rows_P.tobytes(), digest_size=16).hexdigest()

    def without(self, rejected_P: NDArray[np.bool_], reason: str) -> Prompts:
        """Those that are not rejected, the others counted under `reason`."""
        left_out = {**self.left_out, reason: int(rejected_P.sum())} if rejected_P.any() else self.left_out
        kept_P = ~rejected_P
        return replace(self, rows_P=self.rows_P[kept_P], problems_P=self.problems_P[kept_P], left_out=left_out)


def problem_digest(text: str, task: str, reference: Mapping[str, Any]) -> str:
    """Of what is asked, before any template or tokenizer: the same problem has the same digest for every model."""
    return hashlib.blake2b(repr((text, task, sorted(reference.items()))).encode(), digest_size=8).hexdigest()


class ShuffledPrompts:
    """The prompts as an endless sequence: each epoch in an order of its own, fixed by the seed.

    The order of an epoch sorts prompts by 64-bit draws of PCG64([seed, epoch]). NumPy guarantees the stream of a bit
    generator (NEP 19), so the order stays what it is: a run can be resumed under another version of NumPy.
    """

    def __init__(self, prompts: Prompts, *, seed: int) -> None:
        assert len(prompts)
        self._prompts, self._seed = prompts, seed
        self._epoch = -1
        self._order_P: NDArray[np.intp] = np.empty(0, np.intp)

    def __getitem__(self, ordinal: int) -> Prompt:
        epoch, place = divmod(ordinal, len(self._prompts))
        if epoch != self._epoch:
            draws_P = np.random.PCG64([self._seed, epoch]).random_raw(len(self._prompts))
            self._epoch, self._order_P = epoch, np.argsort(draws_P, kind="stable")
        return self._prompts[int(self._order_P[place])]

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{self._seed}/{self._prompts.fingerprint}".encode(), digest_size=16).hexdigest()


class MixedPrompts:
    """Several sources as one: every beginning of it holds each source as near its share as whole prompts allow.

    Which source the n-th prompt is of depends on the shares alone; a source gives its prompts in its own order.
    """

    def __init__(self, sources: Sequence[ShuffledPrompts], shares: Sequence[float]) -> None:
        """`shares` sum to 1."""
        self._sources, self._shares = sources, shares
        self._next = [0] * len(sources)
        self._places = array("q")  # of each ordinal: its place in its source, times their number, plus which it is

    def __getitem__(self, ordinal: int) -> Prompt:
        while len(self._places) <= ordinal:
            due = [share * (len(self._places) + 1) - num for share, num in zip(self._shares, self._next, strict=True)]
            source = due.index(max(due))
            self._places.append(self._next[source] * len(self._sources) + source)
            self._next[source] += 1
        place, source = divmod(self._places[ordinal], len(self._sources))
        return self._sources[source][place]

    @property
    def fingerprint(self) -> str:
        parts = [f"{share}/{source.fingerprint}" for share, source in zip(self._shares, self._sources, strict=True)]
        return hashlib.blake2b("/".join(parts).encode(), digest_size=16).hexdigest()
