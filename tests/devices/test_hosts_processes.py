"""Several processes for real, on this machine: gloo between them, two devices each."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import announcements, gone

PROGRAM = Path(__file__).parents[1] / "support" / "member.py"
PATIENCE = 60.0  # seconds, half of what is promised
ENDLESS = 10**9


@contextmanager
def started(count: int, steps: int, *fault: str) -> Iterator[list[subprocess.Popen]]:
    settings = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    members = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(steps), *fault],
            env=os.environ | settings | announced,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for announced in announcements(count)
    ]
    try:
        yield members
    finally:
        for member in members:
            member.kill()
            member.communicate()


def in_the_loop(members: list[subprocess.Popen]) -> None:
    assert members[0].stdout.readline() == "step 0\n", members[0].stderr.read()


def ended(member: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    out, err = member.communicate(timeout=PATIENCE)
    return member.returncode, out, err


@pytest.mark.parametrize("count", [2, 4])
def test_a_run_of_several_ends_well_and_process_0_alone_speaks(count: int) -> None:
    with started(count, 3) as members:
        first, *others = [ended(member) for member in members]
        assert first == (
            0,
            f"step 0\nstep 1\nstep 2\nprocess 0 of {count} with {2 * count} devices\n",
            "",
        )
        assert others == [(0, "", "")] * (count - 1)


@pytest.mark.parametrize(("count", "killed"), [(2, 0), (2, 1), (4, 0), (4, 3)])
def test_when_a_process_is_killed_the_others_stop_with_one_sentence(
    count: int, killed: int
) -> None:
    with started(count, ENDLESS) as members:
        in_the_loop(members)
        members[killed].kill()
        assert ended(members[killed])[0] == -signal.SIGKILL
        for process in set(range(count)) - {killed}:
            assert ended(members[process])[::2] == (1, gone(killed, count))


def test_when_process_0_is_silent_the_other_stops_with_one_sentence() -> None:
    """As it would be if its machine lost the network: no connection is closed."""
    with started(2, ENDLESS) as members:
        in_the_loop(members)
        members[0].send_signal(signal.SIGSTOP)
        assert ended(members[1]) == (1, "", gone(0, 2))


def test_a_terminated_process_ends_and_the_others_with_it() -> None:
    with started(2, ENDLESS) as members:
        in_the_loop(members)
        members[1].terminate()
        assert ended(members[1])[0] == -signal.SIGTERM
        assert ended(members[0])[::2] == (1, gone(1, 2))


@pytest.mark.parametrize(
    ("fault", "who", "code", "words"),
    [
        ("raise", 1, 1, "ValueError: image must be an image\n"),
        ("exit", 0, 3, ""),
        ("return", 1, 4, ""),
    ],
)
def test_a_process_that_fails_says_why_and_the_others_stop(
    fault: str, who: int, code: int, words: str
) -> None:
    with started(2, ENDLESS, fault, str(who)) as members:
        failed, other = ended(members[who]), ended(members[1 - who])
        assert failed[0] == code
        assert failed[2].endswith(words)
        assert other[::2] == (1, gone(who, 2))


def test_what_all_stumble_over_each_tells_in_its_own_words() -> None:
    with started(2, ENDLESS, "raise", "99") as members:
        for code, _, err in map(ended, members):
            assert (code, err.splitlines()[-1]) == (1, "ValueError: image must be an image")
