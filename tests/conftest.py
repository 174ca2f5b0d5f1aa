import json
import math
import multiprocessing
import os
import sys
import tempfile
from itertools import chain, pairwise

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in two processes

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
        fork = multiprocessing.get_context("fork")
        second = fork.Process(target=second_process, args=(session, turns, reports))
        second.start()
        run(session, turns)
        second.join()
        reports.seek(0)
        for line in reports:
            data = json.loads(line)
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            config.hook.pytest_runtest_logreport(report=report)
    if second.exitcode:
        raise RuntimeError("the second process broke off: not all tests were run")
    return True


def run(session, turns):
    taken = (item for turn in iter(lambda: os.read(turns, 1), b"")
             for item in session.items[AT_A_TIME * turn[0] :][:AT_A_TIME])
    for item, following in pairwise(chain(taken, [None])):
        if not (session.shouldfail or session.shouldstop):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def second_process(session, turns, reports):
    """Run tests without a word, and write their reports."""
    plugins, hook = session.config.pluginmanager, session.config.hook
    plugins.unregister(name="terminalreporter")
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()  # into files of its own

    class Written:
        def pytest_runtest_logreport(self, report):
            data = hook.pytest_report_to_serializable(config=session.config, report=report)
            print(json.dumps(data, default=str), file=reports, flush=True)

    plugins.register(Written())
    run(session, turns)


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
