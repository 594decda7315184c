"""Mutants of small programs, all of them, by hand."""

from __future__ import annotations

import ast

from rlpost.curation.mutants import mutants


def every(source: str, *, script: bool = False) -> dict[str, str]:
    """All mutants of the source with their kinds."""
    return {item.source: item.kind for item in mutants(source, limit=99, seed="", script=script)}


def test_all_mutants_of_a_comparison() -> None:
    def program(returned: str) -> str:
        return f"def f(x):\n    return {returned}"

    assert every("def f(x):\n    return x > 3 and x < 9") == {
        program("x >= 3 and x < 9"): "comparison",
        program("x > 3 and x <= 9"): "comparison",
        program("x > 3 or x < 9"): "logic",
        program("x > 4 and x < 9"): "constant",
        program("x > 2 and x < 9"): "constant",
        program("x > 3 and x < 10"): "constant",
        program("x > 3 and x < 8"): "constant",
        program("True"): "return",
        program("False"): "return",
        program("0"): "return",
    }


def test_loops_conditions_and_statements_that_go() -> None:
    source = "def f(n):\n    s = n\n    for i in range(n):\n        if i in s:\n            s += i\n    print(s)\n    s.sort()"
    found = {kind: [s for s, k in every(source).items() if k == kind] for kind in set(every(source).values())}
    assert {kind: len(sources) for kind, sources in found.items()} == {
        "range": 2, "comparison": 1, "condition": 1, "arithmetic": 1, "dropped": 3,
    }  # fmt: skip
    assert any("range(n + 1)" in s for s in found["range"]) and any("range(n - 1)" in s for s in found["range"])
    assert "s -= i" in found["arithmetic"][0] and "if not i in s" in found["condition"][0]
    # What is printed changes no value; the assignment is needed for anything to run at all.
    assert all("print(s)" in s and "s = n" in s for s in found["dropped"])


def test_what_runs_as_main_is_mutated_in_scripts_only() -> None:
    source = "def f(x):\n    return x\nif __name__ == '__main__':\n    print(f(int(input()) + 5))"
    assert set(every(source).values()) == {"return"}
    assert {"constant", "arithmetic", "dropped"} <= set(every(source, script=True).values())


def test_a_draw_is_fixed_by_its_seed_differs_from_the_source_and_mixes_kinds() -> None:
    source = "def f(x):\n    y = [1, 2, 3, 4, 5, 6, 7, 8, 9]\n    if x > 3:\n        return y\n    return x + 10"
    drawn = mutants(source, limit=5, seed="a", script=False)
    assert drawn == mutants(source, limit=5, seed="a", script=False) != mutants(source, limit=5, seed="b", script=False)
    assert len({item.source for item in drawn} | {ast.unparse(ast.parse(source))}) == 6
    assert len({item.kind for item in drawn}) == 5
