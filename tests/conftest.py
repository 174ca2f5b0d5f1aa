import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that each of several processes has a core

import pytest  # noqa: E402
import torch  # noqa: E402

pytest.register_assert_rewrite("tests.sd.reference")  # a failure shows its values

from .coursework import assignment  # noqa: E402
from .coursework.exercises import CHECKS, EXERCISES  # noqa: E402

IN_A_COPY = assignment.SOLUTIONS.is_file()  # where a student's exercises are graded, and no more
if IN_A_COPY:
    sys.meta_path.insert(0, assignment.Solved)
import sd_mini  # noqa: E402


@pytest.fixture(scope="session")
def sd():
    """The toy model. A test that trains copies what it trains."""
    return sd_mini.load("toy")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# --- grading exercises

def pytest_addoption(parser):
    parser.addoption("--exercise", type=int, choices=list(EXERCISES), help="grade one exercise")
    parser.addoption("--grade-seed", type=int, default=0, help="seed of the grader's inputs")


def grades(config):
    return config.getoption("--exercise") or IN_A_COPY


def pytest_configure(config):
    if not __debug__:
        raise pytest.UsageError("Python was told to leave out assertions, which are what tests and "
                                "grades are made of: unset PYTHONOPTIMIZE, drop -O")
    config.addinivalue_line("markers", "long: is begun before the others")
    if grades(config) and config.option.tbstyle == "auto":
        config.option.tbstyle, config.option.reportchars = "no", ""  # the score says it all


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not item.get_closest_marker("long"))
    if wanted := config.getoption("--exercise"):
        items[:] = [item for item in items if item.name.startswith(f"test_exercise[{wanted}-")]


def pytest_terminal_summary(terminalreporter, config):
    """In a grading the points of each exercise and what was expected; the points in grade.json."""
    if not grades(config):
        return
    stats, say, scores = terminalreporter.stats, terminalreporter.write_line, {}
    ran = [each for kind in ("passed", "failed", "error") for each in stats.get(kind, [])]
    terminalreporter.section("score")
    for number, exercise in EXERCISES.items():
        own = [each for each in ran if f"::test_exercise[{number}-" in each.nodeid]
        if own:
            points, of = sum(each.passed for each in own), len(CHECKS[number])
            say(f"Exercise {number:<3} {exercise.title:<32} {points}/{of}")
            crashes = [each.longrepr.reprcrash for each in own if each.failed]
            for line in dict.fromkeys(f"    {crash.message}" for crash in crashes):
                say(line)
            scores[number] = {"title": exercise.title, "points": points, "of": of}
    grade = {"seed": config.getoption("--grade-seed"), "exercises": scores}
    (assignment.ROOT / "grade.json").write_text(json.dumps(grade, indent=2) + "\n")
