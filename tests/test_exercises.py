"""Grades the exercises: in a student's copy the student's, here the solutions, which get full marks."""
import pytest

from . import assignment
from .exercises import CHECKS, EXERCISES


@pytest.mark.parametrize("number, check", [(n, check) for n in EXERCISES for check in CHECKS[n]],
                         ids=[f"{n}-{check.__name__}" for n in EXERCISES for check in CHECKS[n]])
def test_exercise(number, check, sd, request):
    seed = request.config.getoption("--grade-seed")
    with assignment.standing_in(number, assignment.students(), assignment.references(), sd) as solution:
        for s in (seed, seed + 1)[: 1 if number == 10 else 2]:  # 10 takes seconds
            check(solution, s)
