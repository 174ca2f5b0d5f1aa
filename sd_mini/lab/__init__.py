"""What every experiment needs and no paper describes. You need not open it to read the paper.

A method is handed to `main`: how to train, and which attacks there are. It gets a command line,
evaluation, comparison, resume and pictures. See README.md beside this file.
"""
import os
import sys

from .settings import EvalAttack, Method, Settings, parse, setting

__all__ = ["EvalAttack", "Method", "Settings", "main", "setting"]


class Output:
    """A stream that ends no run: its reader may be gone (`| head`), or its encoding small."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def main(method, argv=None):
    """The command line of a method. Ends the process with the status of `tasks.run_task`."""
    given = parse(method.config, argv)
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    from .tasks import run_task  # here, since it loads matplotlib, which no import needs

    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: faster on the CPU, same bytes
    sys.exit(run_task(method, given))
