import json
import math
import os
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in two processes

import pytest  # noqa: E402
import torch  # noqa: E402

from .coursework import assignment  # noqa: E402
from .coursework.exercises import CHECKS, EXERCISES  # noqa: E402

assignment.stand_in()  # before a student's files are imported
import sd_mini  # noqa: E402


@pytest.fixture(scope="session")
def sd():
    """The toy model. A test that trains copies what it trains."""
    return sd_mini.load("toy")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# --- a large suite runs in two processes

AT_A_TIME = 8


def pytest_runtestloop(session):
    """On Linux a second process takes part: each takes the next few tests until none is left.

    It writes its reports to a file. The first process shows them at the end. Tests marked `long`
    come first, so that no process has one left over.
    """
    config, items = session.config, session.items
    small = len(items) < 50 or config.option.collectonly or session.testsfailed
    if small or grades(config) or sys.platform != "linux":
        return None  # as pytest does by itself
    items.sort(key=lambda item: not item.get_closest_marker("long"))
    turns, write_end = os.pipe()
    os.write(write_end, bytes(range(math.ceil(len(items) / AT_A_TIME))))
    os.close(write_end)
    with tempfile.NamedTemporaryFile("w+") as reports:
        child = os.fork()
        if not child:
            second_process(session, turns, reports)
        run(session, turns)
        os.waitpid(child, 0)
        reports.seek(0)
        for line in reports:
            data = json.loads(line)
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            config.hook.pytest_runtest_logreport(report=report)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    done = config.pluginmanager.getplugin("finished").count
    if done < len(items):
        raise RuntimeError(f"the second process broke off: {done} of {len(items)} tests were run")
    return True


def run(session, turns):
    taken = (item for turn in iter(lambda: os.read(turns, 1), b"")
             for item in session.items[AT_A_TIME * turn[0] :][:AT_A_TIME])
    item = next(taken, None)
    while item and not (session.shouldfail or session.shouldstop):
        following = next(taken, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following


def second_process(session, turns, reports):
    """Run tests without a word, write their reports, and end."""
    plugins, hook = session.config.pluginmanager, session.config.hook
    plugins.unregister(name="terminalreporter")
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing(), capture.start_global_capturing()  # files of its own

    class Written:
        def pytest_runtest_logreport(self, report):
            data = hook.pytest_report_to_serializable(config=session.config, report=report)
            print(json.dumps(data, default=str), file=reports, flush=True)

    plugins.register(Written())
    try:
        run(session, turns)
    finally:
        os._exit(0)


class Finished:
    """How many tests this process knows to be run."""

    count = 0

    def pytest_runtest_logreport(self, report):
        self.count += report.when == "teardown"


# --- grading exercises: a student's copy runs these tests alone

def pytest_addoption(parser):
    parser.addoption("--exercise", type=int, choices=list(EXERCISES), help="grade one exercise")
    parser.addoption("--grade-seed", type=int, default=0, help="seed of the grader's inputs")


def grades(config):
    return config.getoption("--exercise") or assignment.REFERENCE.is_file()


def pytest_configure(config):
    if not __debug__:
        raise pytest.UsageError("Python was told to leave out assertions, which are what tests and "
                                "grades are made of: unset PYTHONOPTIMIZE, drop -O")
    config.addinivalue_line("markers", "long: is begun before the others")
    config.pluginmanager.register(Finished(), "finished")
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
    (assignment.ROOT / "grade.json").write_text(json.dumps(grade, indent=2) + "\n")
