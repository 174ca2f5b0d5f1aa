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
    """The toy model; tests that train copy what they train."""
    return sd_mini.load("toy")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# --- tests marked `beside` only wait for processes of their own: a thread begins them, one by one, beside the others

def pytest_runtestloop(session):
    if session.config.option.collectonly:
        return
    session.items.sort(key=lambda item: bool(item.get_closest_marker("beside")))  # their results are asked for last
    thread, folder = ThreadPoolExecutor(1), tempfile.TemporaryDirectory()
    session.config.add_cleanup(folder.cleanup)
    for item in session.items:
        if item.get_closest_marker("beside"):
            begun = thread.submit(item.obj, Path(tempfile.mkdtemp(dir=folder.name)))
            item.obj = lambda tmp_path, begun=begun: begun.result()


# --- grading exercises: a student's copy runs these tests alone

def pytest_addoption(parser):
    parser.addoption("--exercise", type=int, choices=list(EXERCISES), help="grade one exercise")
    parser.addoption("--grade-seed", type=int, default=0, help="seed of the grader's inputs")


def grades(config):
    return config.getoption("--exercise") or assignment.REFERENCE.is_file()


def pytest_configure(config):
    config.addinivalue_line("markers", "beside: runs in a thread, beside the others; takes tmp_path alone")
    if grades(config) and config.option.tbstyle == "auto":
        config.option.tbstyle = "line"  # what was expected, without the grader's source


def pytest_ignore_collect(collection_path, config):
    return True if grades(config) and collection_path.name.startswith("test_") and collection_path.name != "test_exercises.py" else None


def pytest_collection_modifyitems(config, items):
    if wanted := config.getoption("--exercise"):
        items[:] = [item for item in items if item.name.startswith(f"test_exercise[{wanted}-")]


def pytest_terminal_summary(terminalreporter, config):
    if not grades(config):
        return
    passed = {report.nodeid.split("[")[-1].rstrip("]") for report in terminalreporter.stats.get("passed", []) if report.when == "call"}
    ran = passed | {report.nodeid.split("[")[-1].rstrip("]") for report in terminalreporter.stats.get("failed", [])}
    scores = {}
    terminalreporter.section("score")
    for number, exercise in EXERCISES.items():
        points = [f"{number}-{check.__name__}" in passed for check in CHECKS[number]]
        if any(f"{number}-{check.__name__}" in ran for check in CHECKS[number]):
            terminalreporter.write_line(f"Exercise {number:<3} {exercise.title:<32} {sum(points)}/{len(points)}")
            scores[number] = {"title": exercise.title, "points": sum(points), "of": len(points)}
    (config.rootpath / "grade.json").write_text(json.dumps({"seed": config.getoption("--grade-seed"), "exercises": scores}, indent=2) + "\n")
