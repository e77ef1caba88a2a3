"""What tests of several processes set and expect."""

import socket


def announcements(count: int) -> list[dict[str, str]]:
    """What each process finds in its environment."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    announced = {"COGI2V_COORDINATOR": f"localhost:{port}", "COGI2V_PROCESSES": str(count)}
    # A proxy that does not answer must not matter: nothing here is outside.
    announced |= {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    return [announced | {"COGI2V_PROCESS": str(process)} for process in range(count)]


def gone(process: int, count: int) -> str:
    return f"cogi2v: process {process} of {count} (host {socket.gethostname()}) is gone; this one stops too\n"
