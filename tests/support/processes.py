"""Several processes on this machine: their environment, and what they print."""

import re
import socket


def announcements(count: int) -> list[dict[str, str]]:
    """The environment variables of each process."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    announced = {"COGI2V_COORDINATOR": f"localhost:{port}", "COGI2V_PROCESSES": str(count)}
    # A proxy that does not answer must not matter: the other processes are not behind it.
    announced |= {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    return [announced | {"COGI2V_PROCESS": str(process)} for process in range(count)]


# What the gloo library prints to stdout in each thread of a process: the parts may interleave.
GLOO = re.compile(
    r"(\[Gloo\] Rank | is connected to | peer ranks\. |"
    r"Expected number of connected peer ranks is : |\d)*\n"
)


def without_gloo(out: str) -> str:
    """What a program printed itself, without gloo's lines."""
    return "".join(line for line in out.splitlines(True) if not GLOO.fullmatch(line))
