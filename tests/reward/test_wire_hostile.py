"""What a hostile process may send to a trusted one: trees that stand for more than they weigh, and replies that end loops."""

from __future__ import annotations

import json

import pytest

from reward import Outcome, RewardPool
from reward.child import wire
from reward.comparison import same_json, same_output
from reward.fences import extract_program
from reward.verdict import printable
from tests.reward.test_exploits import response

LONG = "0x" + "f7" * 500_000
HEAVY_TREES = {
    "a fraction of two million digits": ["F", LONG + "1", LONG + "3"],
    "a decimal of four million digits": ["D", "0." + "1" * 4_000_000],
    "many small decimals of many digits": ["l", [["D", "1e-9999"]] * 200_000],
    "many floats": ["l", [["f", "0x1p-1074"]] * 200_000],
    "a text of exclamation marks": "!" * 4_000_000,
    "a text of escapes": '\\"' * 2_000_000,
    "a set of everything": ["s", list(range(400_000))],
    "an integer of four million digits": ["i", "0x" + "f" * 4_000_000],
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("tree", HEAVY_TREES.values(), ids=HEAVY_TREES.keys())
def test_a_frame_cannot_hang_or_fill_the_trusted_process(tree: object) -> None:
    """Seconds at most, where gcd or conversion would take minutes; and text no longer than 60 times the frame."""
    payload = json.dumps(tree).encode()
    assert len(wire.canonical(wire.loads(payload))) < 60 * len(payload)
    assert not same_json(wire.loads(payload), 0.5, 1e-6)
    assert not same_json(wire.loads(payload), [[1]], 1e-6)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "unit", ["```\n", "```python\n", "~~~", "` ", "<think>", "</think>", "def __eq__(", "os.", "\\n", "'" * 7]
)
def test_a_megabyte_of_hostile_text_is_searched_in_linear_time(unit: str) -> None:
    from reward.suspicion import flags

    text = unit * (1_000_000 // len(unit))
    extract_program(text)
    flags(text[:60_000], ["48271", "16807"])


def test_a_candidate_cannot_end_the_tests_loop_early(pool: RewardPool) -> None:
    """StopIteration out of the candidate would end `zip` and `map` in the test, and with them the checks that remain."""
    loop = "for got, wanted in zip(map(f, (2, 3)), (48271, 16807)):\n    assert got == wanted"
    for error in ("StopIteration", "StopAsyncIteration"):
        verdict = pool.score("code", response(f"def f(x): raise {error}"), {"tests": [loop]})
        assert verdict.outcome is Outcome.WRONG, verdict.detail
    right = "def f(x): return 48271 if x == 2 else 16807"
    assert pool.score("code", response(right), {"tests": [loop]}).outcome is Outcome.CORRECT


def test_a_setup_in_the_candidates_process_may_not_hold_expected_values(pool: RewardPool) -> None:
    reference = {"tests": ["assert depth(root) == wanted"], "setup": "root = Node(1)\nwanted = 48271"}
    with pytest.raises(ValueError, match="whose right side it cannot touch"):
        pool.score("code", response("class Node: ..."), reference)


@pytest.mark.parametrize("raised", ["'\\ud800'", "'\\x1b[31mred\\x00'", "'\\u202e'", "b'\\xff'"])
def test_details_can_be_printed_and_written_anywhere(pool: RewardPool, raised: str) -> None:
    verdict = pool.score("code", response(f"def f(x): raise ValueError({raised})"), {"tests": ["assert f(1) == 2"]})
    assert verdict.detail.isprintable()
    verdict.detail.encode("utf-8")
    assert printable("\ud800a\n\x1b") == "\\ud800a\\n\\x1b"


OUTPUTS = [
    ("1 2\n3\n", "1 2 \n3\n\n", None, True),
    ("1 2 3", "1 2\n3", None, False),
    ("0.333333334", "0.3333333333", None, True),
    ("0.5", "0.50000", None, True),
    ("5e-1", "0.5", None, True),
    ("0.34", "0.3333", None, False),
    ("3.0", "3", None, False),
    ("3.0", "3", 1e-9, True),
    ("3.1", "3", 1e-9, False),
    ("0.50", "0.5", 0, False),
    ("nan", "0.5", None, False),
    ("inf", "0.5", None, False),
    ("1_0.0", "10.0", None, False),
    ("1000000.4", "1000000.0", None, True),
    ("1000001.4", "1000000.0", None, False),
    ("YES", "Yes", None, False),
    ("", "1", None, False),
]


@pytest.mark.parametrize(("written", "expected", "tolerance", "same"), OUTPUTS)
def test_output_is_compared_as_the_problem_allows(
    written: str, expected: str, tolerance: float | None, same: bool
) -> None:
    """10^6 + 0.4 is within 1e-6 of 10^6 relative to it; 10^6 + 1.4 is not."""
    assert same_output(written, expected, tolerance) is same


def tree_of(value: object) -> object:
    def refuse(value: object) -> list[object]:
        return ["o", 0, True, "thing"]

    return json.loads(json.dumps(wire.encode(value, refuse)))


VALUES = [
    ((1, 2), [1, 2], True),
    ([1, [2, 3]], [1, [2, 4]], False),
    (2.0, 2, True),
    (2.0000001, 2.0, True),
    (2.1, 2.0, False),
    (2.0000001, 2, False),
    (True, True, True),
    ("1", 1, False),
    (None, None, True),
    (0, None, False),
    ({"a": (1,)}, {"a": [1]}, True),
    ({"a": 1, "b": 2}, {"a": 1}, False),
    ([], {}, False),
    (float("nan"), 2.0, False),
    (float("inf"), 2.0, False),
    (object(), 2, False),
    ({1, 2}, [1, 2], False),
    (2**70, 2**70, True),
    (10**400, 2.0, False),
]


@pytest.mark.parametrize(("returned", "expected", "same"), VALUES)
def test_returned_values_are_compared_with_json(returned: object, expected: object, same: bool) -> None:
    assert same_json(tree_of(returned), expected, 1e-6) is same
