"""Grade the exercises: in a student's copy the student's, here the solutions: full marks."""
import pytest

from .assignment import standing_in
from .exercises import CHECKS, EXERCISES

CASES = [(number, check) for number in EXERCISES for check in CHECKS[number]]
IDS = [f"{number}-{check.__name__}" for number, check in CASES]


@pytest.mark.parametrize("number, check", CASES, ids=IDS)
def test_exercise(number, check, sd, request):
    seed = request.config.getoption("--grade-seed")
    with standing_in(number, sd) as solution:
        for s in (seed, seed + 1)[: 1 if number == 10 else 2]:  # 10 takes seconds
            check(solution, s)
