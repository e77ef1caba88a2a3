"""Several real processes on this machine, with two devices each and gloo between them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import announcements, without_gloo

PROGRAM = Path(__file__).parents[1] / "support" / "member.py"
PATIENCE = 60.0  # seconds within which the others must end; the program's heartbeat is short
ENDLESS = 10**9
SHARING = """
import sys
from cogi2v_jax.devices import hosts

@hosts.distributed
def main() -> int:
    hosts.join(10)
    for text in ("a \\u732b jumps", "", "long " * 10000):
        assert hosts.share(text if hosts.leads() else "another one") == text
    return 0

sys.exit(main())
"""
SETTINGS = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONPATH": os.pathsep.join(sys.path),
}

Announced = list[dict[str, str]]


@contextmanager
def started(announced: Announced, steps: int, *fault: str) -> Iterator[list[subprocess.Popen]]:
    with started_program(announced, str(PROGRAM), str(steps), *fault) as members:
        yield members


@contextmanager
def started_program(announced: Announced, *arguments: str) -> Iterator[list[subprocess.Popen]]:
    members = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | SETTINGS | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in announced
    ]
    try:
        yield members
    finally:
        for member in members:
            member.kill()
            member.communicate()


def wait_for_the_loop(members: list[subprocess.Popen]) -> None:
    said = iter(members[0].stdout.readline, "")
    assert "step 0\n" in said, members[0].stderr.read()


def ended(member: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    out, err = member.communicate(timeout=PATIENCE)
    return member.returncode, without_gloo(out), err


def by_slurm(count: int) -> Announced:
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    common = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    common |= {"JAX_COORDINATOR_PORT": str(port)}
    return [
        common | {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
        for process in range(count)
    ]


@pytest.mark.parametrize(
    ("announce", "count"), [(announcements, 2), (announcements, 4), (by_slurm, 2)]
)
def test_a_run_of_several_ends_well_and_only_process_0_prints(
    announce: Callable[[int], Announced],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with started(announce(count), 3) as members:
        first, *others = [ended(member) for member in members]
    last = f"process 0 of {count} with {2 * count} devices\n"
    assert first == (0, f"step 0\nstep 1\nstep 2\n{last}", "")
    assert others == [(0, "", "")] * (count - 1)
    assert not [*tmp_path.iterdir()]  # no temporary folder is left


@pytest.mark.parametrize(
    ("count", "lost", "how"),
    [
        (2, 0, signal.SIGKILL),
        (4, 3, signal.SIGKILL),
        (2, 1, signal.SIGTERM),
        (2, 0, signal.SIGSTOP),  # like a lost network: no connection is closed
    ],
)
def test_when_a_process_is_lost_the_others_end_with_an_error(
    count: int, lost: int, how: signal.Signals
) -> None:
    with started(announcements(count), ENDLESS) as members:
        wait_for_the_loop(members)
        members[lost].send_signal(how)
        if how != signal.SIGSTOP:
            assert ended(members[lost])[0] == -how
        for process in set(range(count)) - {lost}:
            assert ended(members[process])[0] != 0


@pytest.mark.parametrize(
    ("fault", "who", "code", "last"),
    [
        ("raise", 1, 1, "ValueError: image must be an image\n"),
        ("exit", 0, 3, ""),
        ("return", 1, 4, ""),
    ],
)
def test_a_process_that_fails_prints_its_error_and_the_others_end(
    fault: str, who: int, code: int, last: str
) -> None:
    with started(announcements(2), ENDLESS, fault, str(who)) as members:
        failed, other = ended(members[who]), ended(members[1 - who])
    assert failed[0] == code
    assert failed[2].endswith(last)
    assert other[0] != 0


def test_processes_that_all_fail_alike_all_print_the_error() -> None:
    with started(announcements(2), ENDLESS, "raise", "99") as members:
        for code, _, err in map(ended, members):
            assert (code, err.splitlines()[-1]) == (1, "ValueError: image must be an image")


def test_all_processes_have_the_text_of_process_0() -> None:
    with started_program(announcements(2), "-c", SHARING) as members:
        assert [ended(member) for member in members] == [(0, "", "")] * 2
