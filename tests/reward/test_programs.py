"""How programs are found in responses and tests are turned into questions."""

from __future__ import annotations

import json

import pytest

from reward import check_reference
from reward.child import wire
from reward.fences import extract_program
from reward.programs import plan_reference

CODE = "def f(x):\n    return x\n"
RESPONSES = [
    (f"```python\n{CODE}```", CODE),
    (f"Sure:\n```py\n{CODE}```\nDone.", CODE),
    (f"```\n{CODE}```", CODE),
    (f"```python\nold\n```\nBetter:\n```python\n{CODE}```", CODE),
    (f"```bash\npip install x\n```\ntext\n```python\n{CODE}```", CODE),
    (f"```python\n{CODE}```\nOutput:\n```text\n42\n```", CODE),
    (f"```python\n{CODE}```\nOutput:\n```\n42\n```", CODE),
    (f"```python\n{CODE}", CODE),
    (f"<think>```python\nno\n```</think>```python\n{CODE}```", CODE),
    (CODE, CODE),
    ("<think>```python\ndef f(x): return 1\n```", None),
    ("```python\n\n```", None),
    ("   ", None),
    ("#" * 100_000, None),
]


@pytest.mark.parametrize(("response", "program"), RESPONSES)
def test_the_last_python_block_is_the_program(response: str, program: str | None) -> None:
    found = extract_program(response)
    assert (found and found[0]) == program


def test_a_literal_assertion_is_asked_without_its_expected_value() -> None:
    plan = plan_reference(
        {"tests": ["assert f([1, 2]) == 12345", "assert not f('a')", "assert Box(3).get(2) == {1, 2}"]}
    )
    sources = [case.source for cases in plan.cases for case in cases]
    assert sources == ["f([1, 2])", "f('a')", "Box(3).get(2)"]
    assert all(b"12345" not in case.request for cases in plan.cases for case in cases)
    assert [case.expected for cases in plan.cases for case in cases] == ["n3039", False, "s(n1,n2)"]


@pytest.mark.parametrize(
    "test",
    [
        "assert abs(f(2) - 4) == 0",
        "assert (f(2) == 4) == True",
        "assert f(3, f(2) == 4) == 5",
        "assert set(f([1, 2])) == {1, 2}",
        "assert f(2) == g(4)",
        "assert f(2) in (3, 4)",
        "assert math.isclose(f(2), 0.5)",
        "x = f(2)\nassert x == 4",
    ],
)
def test_other_shapes_go_to_the_judge_whole(test: str) -> None:
    """A part of what is expected stands on the left, or the comparison is more than one with a literal."""
    plan = plan_reference({"tests": [test]})
    assert plan.snippets == (test,) and not plan.cases
    assert "f" in plan.remote and "math" not in plan.remote


def test_a_check_function_of_literal_assertions_is_one_test_of_several_cases() -> None:
    check = "def check(candidate):\n    assert candidate(1) == 2\n    assert True\n    assert not candidate(0)\n\ncheck(add)\n"
    (cases,) = plan_reference({"tests": [check]}).cases
    assert [(case.source, case.expected) for case in cases] == [("add(1)", "n2"), ("add(0)", False)]


def test_helpers_of_a_trusted_prelude_are_not_asked_of_the_candidate() -> None:
    test = "def check(candidate):\n    for i in range(3): assert candidate(encode(i)) == i\ncheck(decode)\n"
    prelude = "def encode(x):\n    return x + 1\n\ndef decode(x):\n    '''Undo.'''\n"
    assert plan_reference({"tests": [test]}).remote == ("decode", "encode")
    assert plan_reference({"tests": [test], "prelude": prelude, "entry_point": "decode"}).remote == ("decode",)


def test_an_entry_point_named_like_a_builtin_is_the_candidates() -> None:
    plan = plan_reference({"tests": ["assert sum(10, 15) == 6"], "entry_point": "sum"})
    assert plan.cases[0][0].source == "sum(10, 15)"


def test_a_setup_that_builds_the_candidates_objects_runs_with_the_candidate() -> None:
    plan = plan_reference({"tests": ["assert depth(root) == 2"], "setup": "root = Node(1)\nroot.left = Node(2)"})
    assert plan.candidate_setup.endswith("root.left = Node(2)") and plan.cases[0][0].source == "depth(root)"


BAD_REFERENCES = [
    ({}, "at least one test"),
    ({"tests": []}, "at least one test"),
    ({"tests": "assert f(1)"}, "must be a list"),
    ({"tests": ["assert f(1"]}, "is not Python"),
    ({"tests": [5]}, "must be a Python snippet"),
    ({"tests": ["f(1)"]}, "asserts nothing"),
    ({"tests": ["assert 1 + 1 == 2"]}, "calls nothing"),
    ({"tests": ["def check(candidate):\n    assert candidate(1)\n"]}, r"calls nothing|never calls"),
    ({"tests": ["def check(candidate):\n    assert candidate(1)\nf"]}, "never calls"),
    ({"tests": ["assert f(1)"], "setup": "def"}, "setup"),
    ({"tests": [{"input": "1"}]}, "'input' and 'output'"),
    ({"tests": [{"input": "1", "output": "1"}], "entry_point": "a.b.c"}, "Class.method"),
    ({"tests": [{"input": "1", "output": "[1"}], "entry_point": "f"}, r"\['output'\] is not one JSON value"),
    ({"tests": [{"input": "1\nx", "output": "1"}], "entry_point": "f"}, r"\['input'\] is not one JSON value"),
    ({"tests": [{"input": "1", "output": "NaN"}], "entry_point": "f"}, "equals nothing"),
    ({"tests": [{"input": "1", "output": "1"}], "float_tolerance": 2}, "float_tolerance"),
    ({"tests": [{"input": "1" * 2_000_000, "output": "1"}]}, "characters of input"),
]


@pytest.mark.parametrize(("reference", "message"), BAD_REFERENCES)
def test_a_reference_that_judges_nothing_is_refused(reference: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reference("code", reference)


EQUAL = [
    (1, 1.0),
    (1, True),
    (0, -0.0),
    ({1, 2}, frozenset({2.0, True})),
    ({"a": [1]}, {"a": [1.0]}),
    (2**70, float(2**70)),
]
UNEQUAL = [
    (1, "1"),
    ([1], (1,)),
    ([1, 2], [2, 1]),
    ({}, []),
    (None, 0),
    (0.1, 0.1 + 1e-17 + 0.1),
    (b"a", "a"),
    ("N", None),
]


def _canonical(value: object) -> str:
    def refuse(value: object) -> list[object]:
        raise AssertionError(value)

    return wire.canonical(json.loads(json.dumps(wire.encode(value, refuse))))


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_equal_values_have_one_canonical_form(left: object, right: object) -> None:
    assert left == right
    assert _canonical(left) == _canonical(right)


@pytest.mark.parametrize(("left", "right"), UNEQUAL)
def test_different_values_have_different_canonical_forms(left: object, right: object) -> None:
    assert left != right
    assert _canonical(left) != _canonical(right)


def test_nan_and_handles_equal_nothing_but_a_text_may_hold_any_character() -> None:
    assert wire.equals_nothing(_canonical([float("nan")]))
    assert wire.equals_nothing(wire.canonical(["o", 1, True, "F"]))
    assert not wire.equals_nothing(_canonical(['!nan"!', "\\"]))


@pytest.mark.parametrize(
    "tree",
    [["?"], ["l"], ["l", 1], ["i", "9"], ["i", "0xz"], ["F", "0x1", "0x0"], ["d", [1]], {}, [[]], ["D", "nope"], 1.5],
)
def test_forged_values_are_refused(tree: object) -> None:
    try:
        assert wire.canonical(tree).startswith("!")
    except wire.WireError:
        return


def test_a_decimal_with_an_enormous_exponent_costs_nothing() -> None:
    assert wire.canonical(["D", "1e999999999"]).startswith("D")
