"""Who is alive: the processes of one run find each other over TCP, meet, and stop together when one
of them is gone.

Each keeps one connection to process 0, for lines of JSON. When a process dies, whatever it died of,
its kernel closes the connection, and all know at once; when a machine or its network dies, silence
tells. jax's own service would notice after its heartbeats ran out, and then answer with a page of
C++ and an abort.
"""

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

# Seconds for all processes to come: like any other end within the two minutes that one may wait for
# a dead one.
ARRIVAL = 100.0
# Seconds: more than a stalled disk or a long call that holds Python's lock, half of what one may
# wait for a dead machine.
SILENCE = 60.0
PULSES = 6  # in that time
# Seconds from knowing of an end to following it: what all processes stumble over, each then tells
# in its own words.
LINGER = 1.0
END = "the end"


class Link:
    """Lines of JSON over a socket."""

    def __init__(self, channel: socket.socket):
        self._channel, self._lines = channel, channel.makefile("rb")
        self._saying = threading.Lock()

    def fileno(self) -> int:
        return self._channel.fileno()

    def say(self, **message: Any) -> None:
        # That nobody hears it is noticed by whoever listens.
        with self._saying, contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def hear(self, seconds: float) -> dict[str, Any] | None:
        """The next message; none if the other end closed, fell silent or speaks another
        language."""
        self._channel.settimeout(seconds)
        try:
            message = json.loads(self._lines.readline(2**16))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        self._lines.close()
        self._channel.close()


def gather(
    port: int, processes: int, service: int, seconds: float = ARRIVAL
) -> tuple[dict[int, Link], list[str]]:
    """Process 0's side of coming together: a link to every other process, and the host of each.
    Tells them the port of jax's service. Raises OSError if they don't all come in time, or one that
    came left again."""
    ends = time.monotonic() + seconds
    links, hosts = dict[int, Link](), {0: socket.gethostname()}
    try:
        with _listener(port) as listener:
            while len(links) < processes - 1:
                ready, *_ = select.select(
                    [listener, *links.values()], [], [], max(0.0, ends - time.monotonic())
                )
                for process, link in links.items():
                    if link in ready:  # which says nothing before it is answered
                        raise ConnectionError(sentence(process, processes, hosts[process]))
                if not ready:
                    late = ", ".join(
                        str(process) for process in range(1, processes) if process not in links
                    )
                    raise TimeoutError(
                        f"all {processes} processes must come within {seconds:g} s: {late} did not; start them together"
                    )
                _greet(Link(listener.accept()[0]), processes, links, hosts)
    except OSError as error:
        for link in links.values():
            link.say(gone=str(error))
            link.close()
        raise
    names = [hosts[process] for process in range(processes)]
    for link in links.values():
        link.say(service=service, hosts=names)
    return links, names


def _greet(link: Link, processes: int, links: dict[int, Link], hosts: dict[int, str]) -> None:
    """Adds who comes, unless it is a stranger or somebody twice."""
    match link.hear(5.0):
        case {"process": int(process), "processes": count, "host": str(host)}:
            if count == processes and 0 < process < processes and process not in links:
                links[process], hosts[process] = link, host
                return
            link.say(
                refused=f"processes must be 0 to {processes - 1}, each once: got another process {process} of {count}"
            )
    link.close()


def come(
    address: tuple[str, int], process: int, processes: int, seconds: float = ARRIVAL
) -> tuple[dict[int, Link], list[str], int]:
    """Any other process's side: a link to process 0, the host of every process, the port of jax's
    service. Raises as `gather` does, and ValueError for a number that is not free."""
    try:
        link = Link(reach(address, seconds))
    except OSError as error:
        host, port = address
        raise TimeoutError(
            f"process 0 must answer at {host}:{port} within {seconds:g} s: got {error}; start all together"
        ) from None
    link.say(process=process, processes=processes, host=socket.gethostname())
    # Process 0, which began to wait later perhaps, says who is missing.
    answer = link.hear(seconds + 5.0)
    match answer:
        case {"service": service, "hosts": hosts}:
            return {0: link}, hosts, service
    link.close()
    match answer:
        case {"refused": line}:
            raise ValueError(line)
        case {"gone": line}:
            raise ConnectionError(line)
    raise ConnectionError(sentence(0, processes, address[0]))


class Watch:
    """Listens to the links in threads of its own: the main thread may hang in a collective that
    will never end. `stop` is called with the sentence when another process is gone, and does not
    return."""

    def __init__(
        self,
        process: int,
        links: dict[int, Link],
        hosts: list[str],
        silence: float = SILENCE,
        stop: Callable[[str], Any] | None = None,
    ):
        self._links, self._hosts = links, hosts
        self._silence, self._stop = silence, stop or _stop
        self._leads = process == 0
        # At a meeting, as far as this process knows.
        self._arrived: defaultdict[str, set[int]] = defaultdict(set)
        self._met: set[str] = set()
        self._change = threading.Condition()
        self._ending = threading.Lock()
        self._over = threading.Event()
        for other, link in links.items():
            threading.Thread(
                target=self._listen, args=(other, link), name=f"watch process {other}", daemon=True
            ).start()
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()

    def meet(self, name: str) -> None:
        """Waits until every process is at the meeting of this name."""
        if self._leads:
            self._arrive(name, 0)
        else:
            self._links[0].say(meet=name)
        with self._change:
            self._change.wait_for(lambda: name in self._met)
            self._met.remove(name)

    def leave(self) -> None:
        """Waits until every process has come to its end. From then on no end is an alarm."""
        self.meet(END)

    def _arrive(self, name: str, process: int) -> None:
        with self._change:
            self._arrived[name].add(process)
            if len(self._arrived[name]) == len(self._hosts):
                del self._arrived[name]
                self._meet(name)
                for link in self._links.values():
                    link.say(met=name)

    def _meet(self, name: str) -> None:
        if name == END:
            self._over.set()
        with self._change:
            self._met.add(name)
            self._change.notify_all()

    def _listen(self, other: int, link: Link) -> None:
        while (message := link.hear(self._silence)) is not None:
            if "meet" in message:
                self._arrive(message["meet"], other)
            elif "met" in message:
                self._meet(message["met"])
            elif "gone" in message:
                self._end(message["gone"])
        if not self._over.is_set():
            self._end(sentence(other, len(self._hosts), self._hosts[other]))
        link.close()

    def _pulse(self) -> None:
        while not self._over.wait(self._silence / PULSES):
            for link in self._links.values():
                link.say()

    def _end(self, line: str) -> None:
        with self._ending:  # never left: the first end is the cause of all that follow
            if self._leads:
                for link in self._links.values():
                    link.say(gone=line)
            time.sleep(LINGER)
            self._stop(line)


def sentence(process: int, processes: int, host: str) -> str:
    return f"process {process} of {processes} (host {host}) is gone; this one stops too"


def _stop(line: str) -> NoReturn:
    """Past Python's own end, which would wait for the main thread."""
    # The terminal's cursor may stand in a line of progress.
    os.write(2, f"{chr(10) if os.isatty(2) else ''}cogi2v: {line}\n".encode())
    os._exit(1)


def reach(address: tuple[str, int], seconds: float) -> socket.socket:
    """A connection to an address that may not be there yet. Raises OSError when the time is
    over."""
    ends = time.monotonic() + seconds
    while True:
        try:
            channel = socket.create_connection(address, timeout=max(1.0, ends - time.monotonic()))
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.2)
        else:
            channel.settimeout(None)
            return channel


def _listener(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        )
    except OSError as error:
        raise OSError(
            f"process 0 must be able to listen on port {port}: got {os.strerror(error.errno or 0)}"
        ) from None


def free_port() -> int:
    with _listener(0) as listener:
        return listener.getsockname()[1]


def shield(address: tuple[str, int]) -> int:
    """A port of this machine that stands for `address` and stays open when what is behind it is
    lost. jax's client aborts its process as soon as it loses its service; behind this it waits, and
    the watch has the last word."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            near = listener.accept()[0]
            try:
                far = reach(address, ARRIVAL)
            except OSError:
                held.append(near)
                continue
            threading.Thread(
                target=pass_on, args=(near, far, far), name="to jax's service", daemon=True
            ).start()
            threading.Thread(
                target=pass_on, args=(far, near, None), name="from jax's service", daemon=True
            ).start()

    def pass_on(source: socket.socket, sink: socket.socket, closes: socket.socket | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
        if closes is None:
            held.append(sink)
        else:
            with contextlib.suppress(OSError):
                closes.shutdown(socket.SHUT_RDWR)

    held: list[socket.socket] = []
    threading.Thread(target=serve, name="jax's service", daemon=True).start()
    return listener.getsockname()[1]
