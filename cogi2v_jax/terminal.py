"""What every command of ours does with its output, whatever reads it."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[..., None]  # takes a line for the user, as `print` does
PIPE_CLOSED = 141  # as of a program that the signal SIGPIPE ended


def printing(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a program that prints: characters that a terminal cannot show are escaped, a reader
    that has closed, such as `head`, ends the program without a word, and what whoever started it
    had closed is the null device."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        _open_standard_streams()
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
            for stream in (sys.stdout, sys.stderr):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return PIPE_CLOSED

    return run


def _open_standard_streams() -> None:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free, which is this one: the next file that is opened would
            # have it otherwise, and whatever a library prints would be in that file.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (as long as the process)
