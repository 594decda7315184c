"""Hand-written scripts for a handful of real stdin/stdout problems; the data has tests and no solutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reward import Outcome, RewardPool
from tests.reward.test_exploits import response
from tests.reward.test_golds import read

pytestmark = pytest.mark.data
# Problem, a right script, what to replace in it, and by what, to make it wrong.
SCRIPTS: dict[str, tuple[str, str, str]] = {
    "1": (
        """
import math
n, k = map(int, input().split())
points = [tuple(map(float, input().split())) for _ in range(n)]
always = sum(1 for x, y in points if x == y == 0)
polar = [(math.hypot(x, y), math.atan2(y, x)) for x, y in points if (x, y) != (0, 0)]
def covered(r):
    ends = []
    for d, angle in polar:
        if d <= 2 * r:
            half = math.acos(d / (2 * r))
            low, high = angle - half, angle + half
            ends += [(low, -1), (high, 1), (low + 2 * math.pi, -1), (high + 2 * math.pi, 1)]
    best = count = 0
    for _, kind in sorted(ends):
        count -= kind
        best = max(best, count)
    return always + best
low, high = 0.0, 2e5
for _ in range(60):
    middle = (low + high) / 2
    if covered(middle) >= k: high = middle
    else: low = middle
print(high)
""",
        "print(high)",
        "print(high + 0.01)",
    ),
    "13": (
        "for _ in range(int(input())):\n    s = input()\n    print('YES' if 2 * s.count('B') == len(s) else 'NO')",
        "2 * s.count('B') == len(s)",
        "len(s) % 2 == 0",
    ),
    "45": (
        """
def main():
    import sys
    data = iter(sys.stdin.read().split())
    for _ in range(int(next(data))):
        days = [int(next(data)) for _ in range(int(next(data)))]
        height, before = 1, 1
        for i, day in enumerate(days):
            if not day and not before and i:
                height = -1
                break
            height += day * (5 if before and i else 1)
            before = day
        print(height)
main()
""",
        "5 if",
        "4 if",
    ),
    "100": (
        "for _ in range(int(input())):\n    input()\n    a = sorted(map(int, input().split()))\n"
        "    print(max([a[0]] + [y - x for x, y in zip(a, a[1:])]))",
        "[a[0]] + ",
        "[0] + ",
    ),
    "120": (
        """
M = 200_001
prefix = []
for bit in range(18):
    row, total = [0] * M, 0
    for i in range(M):
        total += i >> bit & 1
        row[i] = total
    prefix.append(row)
for _ in range(int(input())):
    l, r = map(int, input().split())
    print(r - l + 1 - max(row[r] - row[l - 1] for row in prefix))
""",
        "range(18)",
        "range(2)",
    ),
    "140": (
        """
import math
def cube(n):
    c = round(n ** (1 / 3))
    while c ** 3 > n: c -= 1
    while (c + 1) ** 3 <= n: c += 1
    return c
for _ in range(int(input())):
    n = int(input())
    print(math.isqrt(n) + cube(n) - cube(math.isqrt(n)))
""",
        " - cube(math.isqrt(n))",
        "",
    ),
    "154": (
        "for _ in range(int(input())):\n    a, b, c = sorted(map(int, input().split()))\n"
        "    print('YES' if a + b == c or (a == b and c % 2 == 0) or (b == c and a % 2 == 0) else 'NO')",
        "a + b == c or ",
        "",
    ),
}
TOLERANCES = {"1": 1e-4}


@pytest.mark.parametrize("number", SCRIPTS)
def test_a_right_script_passes_and_a_wrong_one_does_not(data_dir: Path, pool: RewardPool, number: str) -> None:
    (record,) = (r for r in read(data_dir, "code_contests_stdio") if r["id"] == f"code-contests/test/{number}")
    reference: dict[str, Any] = record | {"float_tolerance": TOLERANCES.get(number)}
    program, right, wrong = SCRIPTS[number]
    verdict = pool.score("code", response(program), reference)
    assert verdict.outcome is Outcome.CORRECT, verdict.detail
    assert program.count(right) == 1
    assert pool.score("code", response(program.replace(right, wrong)), reference).outcome is Outcome.WRONG


def test_every_problem_makes_a_plan(data_dir: Path) -> None:
    from reward import check_reference

    for record in read(data_dir, "code_contests_stdio"):
        check_reference("code", record)
