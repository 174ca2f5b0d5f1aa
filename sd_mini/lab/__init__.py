"""What every experiment needs and no paper describes. You need not open it to read the paper.

A method is handed to `main`: how to train, and which attacks there are. It gets a command line,
evaluation, comparison, resume and pictures. See README.md beside this file.
"""
from .settings import Method, Settings, main, setting

__all__ = ["Method", "Settings", "main", "setting"]
