"""What every experiment needs and no paper describes. You need not open it to read the paper.

A method is handed to `main`: how to train, and which attacks there are. It gets a command line,
evaluation, comparison, resume and pictures. See README.md beside this file.
"""
import os
import sys

from .settings import EvalAttack, Method, Settings, parse, setting

__all__ = ["EvalAttack", "Method", "Settings", "main", "setting"]


def main(method, argv=None):
    """The command line of a method. Ends the process with the status of `tasks.run_task`."""
    given = parse(method.config, argv)
    if hasattr(sys.stdout, "reconfigure"):  # a name that a log cannot hold ends no run
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: faster on the CPU, same bytes
    from .tasks import run_task  # here, since it loads matplotlib, which no import needs

    sys.exit(run_task(method, given))
