"""Data sets of any size as endless sequences of prompts: a prompt is made from its row when it is asked for.

P prompts of one data set, in its order.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
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

    A prompt whose group judged last was solved in a share above `retire_above` is not in the epochs that begin after that.
    Which prompts an epoch has is decided when its first one is asked for, and is part of `state`.
    """

    def __init__(self, prompts: Prompts, *, seed: int, retire_above: float | None = None) -> None:
        assert len(prompts)
        self._prompts, self._seed, self._retire_above = prompts, seed, retire_above
        self._starts = [0]  # the first ordinal of each epoch that has begun
        self._left: list[list[int]] = [[]]  # who left when it began
        self._gone: set[int] = set()  # all of them
        self._easy: set[int] = set()  # who will leave when the next one begins
        self._orders: dict[int, NDArray[np.intp]] = {}

    def __len__(self) -> int:
        """Prompts of the epoch that began last."""
        return len(self._prompts) - len(self._gone)

    def __getitem__(self, ordinal: int) -> Prompt:
        """Raises RuntimeError when an epoch would begin without prompts."""
        while ordinal >= self._starts[-1] + len(self):
            if len(self._easy) == len(self):
                raise RuntimeError(
                    f"the policy solves every prompt that is left in a share above retire_above = {self._retire_above}:"
                    " the stage has nothing more to teach. Give it fewer steps, more prompts or a higher retire_above"
                )
            self._starts.append(self._starts[-1] + len(self))
            self._left.append(sorted(self._easy))
            self._gone |= self._easy
            self._easy = set()
        return self._prompts[self._index(ordinal)]

    def observe(self, ordinal: int, solved: float) -> None:
        """The group of `ordinal` has been judged: this share of it is right."""
        if self._retire_above is None:
            return
        index = self._index(ordinal)
        if solved <= self._retire_above:
            self._easy.discard(index)
        elif index not in self._gone:
            self._easy.add(index)

    @property
    def state(self) -> Any:
        """All that the prompt of an ordinal depends on beside seed and data, as plain data."""
        return {"starts": self._starts.copy(), "left": self._left.copy(), "easy": sorted(self._easy)}

    def restore(self, state: Any) -> None:
        self._starts, self._left, self._easy = list(state["starts"]), list(state["left"]), set(state["easy"])
        self._gone, self._orders = set(chain.from_iterable(self._left)), {}

    def _index(self, ordinal: int) -> int:
        epoch = bisect_right(self._starts, ordinal) - 1
        if epoch not in self._orders:
            draws_P = np.random.PCG64([self._seed, epoch]).random_raw(len(self._prompts))
            order_P = np.argsort(draws_P, kind="stable")
            gone = list(chain.from_iterable(self._left[: epoch + 1]))
            # Groups of the epoch before may still be under way.
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) == 1}
            self._orders[epoch] = order_P[~np.isin(order_P, gone)] if gone else order_P
        return int(self._orders[epoch][ordinal - self._starts[epoch]])

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

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def __getitem__(self, ordinal: int) -> Prompt:
        source, place = self._place(ordinal)
        return source[place]

    def observe(self, ordinal: int, solved: float) -> None:
        source, place = self._place(ordinal)
        source.observe(place, solved)

    @property
    def state(self) -> Any:
        return [source.state for source in self._sources]

    def restore(self, state: Any) -> None:
        for source, its in zip(self._sources, state, strict=True):
            source.restore(its)

    def _place(self, ordinal: int) -> tuple[ShuffledPrompts, int]:
        while len(self._places) <= ordinal:
            due = [share * (len(self._places) + 1) - num for share, num in zip(self._shares, self._next, strict=True)]
            source = due.index(max(due))
            self._places.append(self._next[source] * len(self._sources) + source)
            self._next[source] += 1
        place, source = divmod(self._places[ordinal], len(self._sources))
        return self._sources[source], place

    @property
    def fingerprint(self) -> str:
        parts = [f"{share}/{source.fingerprint}" for share, source in zip(self._shares, self._sources, strict=True)]
        return hashlib.blake2b("/".join(parts).encode(), digest_size=16).hexdigest()
