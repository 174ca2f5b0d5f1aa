import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core for the tests, one for those beside them

import pytest  # noqa: E402
import torch  # noqa: E402

import sd_mini  # noqa: E402

from . import assignment  # noqa: E402
from .exercises import CHECKS, EXERCISES  # noqa: E402


@pytest.fixture(scope="session")
def sd():
    """The toy model. A test that trains copies what it trains."""
    return sd_mini.load("toy")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# --- tests marked `beside` only wait for processes of their own
# A thread starts them, one by one, while the other tests run.

def pytest_runtestloop(session):
    if session.config.option.collectonly:
        return
    # The tests marked `beside` go to the end: their results are asked for last.
    session.items.sort(key=lambda item: bool(item.get_closest_marker("beside")))
    thread, folder = ThreadPoolExecutor(1), tempfile.TemporaryDirectory()
    session.config.add_cleanup(folder.cleanup)
    for item in session.items:
        if item.get_closest_marker("beside"):
            begun = thread.submit(item.obj, Path(tempfile.mkdtemp(dir=folder.name)))
            item.obj = waiting_for(begun)


def waiting_for(begun):
    """A test function that waits for one begun in the thread, and fails where that one fails."""
    def test(tmp_path):
        return begun.result()
    return test


# --- grading exercises: a student's copy runs these tests alone

def pytest_addoption(parser):
    parser.addoption("--exercise", type=int, choices=list(EXERCISES), help="grade one exercise")
    parser.addoption("--grade-seed", type=int, default=0, help="seed of the grader's inputs")


def grades(config):
    return config.getoption("--exercise") or assignment.REFERENCE.is_file()


def pytest_configure(config):
    beside = "beside: runs in a thread while other tests run; takes no fixture but tmp_path"
    config.addinivalue_line("markers", beside)
    if grades(config) and config.option.tbstyle == "auto":
        config.option.tbstyle = "line"  # what was expected, without the grader's source


def pytest_ignore_collect(collection_path, config):
    name = collection_path.name
    is_other_test = name.startswith("test_") and name != "test_exercises.py"
    return True if grades(config) and is_other_test else None


def pytest_collection_modifyitems(config, items):
    if wanted := config.getoption("--exercise"):
        items[:] = [item for item in items if item.name.startswith(f"test_exercise[{wanted}-")]


def ids(reports):
    """The names of checks, in brackets at the end of a report's name: "2-noise_loss_..."."""
    return {report.nodeid.split("[")[-1].rstrip("]") for report in reports}


def pytest_terminal_summary(terminalreporter, config):
    if not grades(config):
        return
    stats = terminalreporter.stats
    passed = ids(report for report in stats.get("passed", []) if report.when == "call")
    ran = passed | ids(stats.get("failed", []))
    scores = {}
    terminalreporter.section("score")
    for number, exercise in EXERCISES.items():
        names = [f"{number}-{check.__name__}" for check in CHECKS[number]]
        points = [name in passed for name in names]
        if any(name in ran for name in names):
            score = f"{sum(points)}/{len(points)}"
            terminalreporter.write_line(f"Exercise {number:<3} {exercise.title:<32} {score}")
            scores[number] = {"title": exercise.title, "points": sum(points), "of": len(points)}
    grade = {"seed": config.getoption("--grade-seed"), "exercises": scores}
    (config.rootpath / "grade.json").write_text(json.dumps(grade, indent=2) + "\n")
