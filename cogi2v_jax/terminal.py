"""What every command of ours does with its output, whatever reads it."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

PIPE_CLOSED = 141  # as of a program that the signal SIGPIPE ended


def printing(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a program that prints: characters that a terminal cannot show are escaped, and a reader
    that has closed, such as `head`, ends the program without a word."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        for stream in (sys.stdout, sys.stderr):
            if reconfigure := getattr(stream, "reconfigure", None):
                reconfigure(errors="backslashreplace")
        try:
            try:
                return main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes once more at the end, and would print the error then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED

    return run
