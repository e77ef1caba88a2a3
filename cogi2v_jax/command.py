"""What `sample`, `prepare` and `train` have in common: whatever a user can cause ends in one line
and an exit code."""

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from .devices import hosts


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exits with one line; argparse's own prints many lines of usage above it."""
        self.exit(2, f"cogi2v: {message} (--help lists all options)\n")


def say(line: str, end: str = "\n") -> None:
    """Prints a line that is not an error, on process 0 alone."""
    if hosts.leads():
        print(line, end=end, file=sys.stderr, flush=True)


def run(work: Callable[[], int | None], stopped: str | Callable[[], str]) -> int:
    """Does a command's work and returns its exit code: that of the work (None: 0), 1 where it could
    not be done, 130 where the user stopped it, after the line `stopped`. Warnings are lines too."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
            return work() or 0
    except BrokenPipeError:
        raise
    except Exception as error:
        if (line := fault_line(error)) is None:
            raise
        print("; ".join([f"cogi2v: {line}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        newline = "\n" if sys.stderr.isatty() else ""
        line = stopped if isinstance(stopped, str) else stopped()
        print(f"{newline}cogi2v: {line}", file=sys.stderr)
        return 130


def fault_line(error: Exception) -> str | None:
    """What a user is told of an error that a user can cause; None for any other."""
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error)
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        first = str(error).partition("\n")[0]
        return f"the device ran out of memory: {first}"
    return None
