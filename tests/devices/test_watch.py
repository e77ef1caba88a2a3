"""Coming together, meeting and missing each other, without jax: every process is a thread of this
one."""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from cogi2v_jax.devices import watch

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LINGER", 0.3)


def together(*processes: Callable[[], Any]) -> list[Future]:
    with ThreadPoolExecutor(len(processes)) as pool:
        return [pool.submit(process) for process in processes]


def close(futures: list[Future]) -> None:
    """The links of processes that came together."""
    for future in futures:
        for link in future.result()[0].values():
            link.close()


class Run:
    """A watch for each process, and the sentences they stop with."""

    def __init__(self, count: int, silence: float = 30.0):
        port = watch.free_port()
        others = [
            lambda process=process: watch.come(("localhost", port), process, count)
            for process in range(1, count)
        ]
        first, *rest = [
            future.result() for future in together(lambda: watch.gather(port, count, 4321), *others)
        ]
        self.services = [service for _, _, service in rest]
        self.links = [first[0], *(links for links, *_ in rest)]
        self.said: list[queue.Queue[str]] = [queue.Queue() for _ in range(count)]
        self.watches = [
            watch.Watch(
                process,
                links,
                first[1],
                silence,
                lambda line, said=said: (said.put(line), threading.Event().wait()),
            )
            for process, (links, said) in enumerate(zip(self.links, self.said, strict=True))
        ]

    def mute(self, process: int) -> None:
        for link in self.links[process].values():
            link.say = lambda **message: None

    def die(self, process: int) -> None:
        self.mute(process)
        for link in self.links[process].values():
            with contextlib.suppress(OSError):  # closed already
                # What a kernel does for a process that is no more.
                link._channel.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("gone", [0, 2])
def test_all_others_say_who_is_gone(gone: int) -> None:
    run = Run(4)
    assert run.services == [4321] * 3
    run.die(gone)
    lines = {run.said[process].get(timeout=20) for process in set(range(4)) - {gone}}
    assert lines == {f"process {gone} of 4 (host {HOST}) is gone; this one stops too"}


def test_the_first_end_is_the_one_that_is_told() -> None:
    run = Run(3)
    run.die(2)
    assert (
        run.said[0].get(timeout=20)
        == run.said[1].get(timeout=20)
        == f"process 2 of 3 (host {HOST}) is gone; this one stops too"
    )
    run.die(1)  # as it would, having said so
    with pytest.raises(queue.Empty):
        run.said[0].get(timeout=2 * watch.LINGER)


@pytest.mark.parametrize("silent", [0, 1])
def test_silence_is_an_end_too(silent: int) -> None:
    run = Run(2, silence=2.0)
    with pytest.raises(queue.Empty):  # pulses keep the links alive for longer than that
        run.said[1 - silent].get(timeout=3.0)
    run.mute(silent)
    assert (
        run.said[1 - silent].get(timeout=20)
        == f"process {silent} of 2 (host {HOST}) is gone; this one stops too"
    )


def test_nobody_leaves_a_meeting_before_all_are_there() -> None:
    run, left = Run(3), queue.Queue()
    names = ("one", "two", "one")  # which may come again

    def attend(process: int) -> None:
        for name in names:
            run.watches[process].meet(name)
            left.put((process, name))

    for process in (0, 1):
        threading.Thread(target=attend, args=(process,), daemon=True).start()
    for name in names:
        with pytest.raises(queue.Empty):
            left.get(timeout=0.3)
        run.watches[2].meet(name)
        assert {left.get(timeout=20) for _ in range(2)} == {(0, name), (1, name)}


def test_after_the_end_nobody_is_missed() -> None:
    run = Run(3)
    for future in together(*(watched.leave for watched in run.watches)):
        future.result(timeout=20)
    for process in range(3):
        run.die(process)
    time.sleep(2 * watch.LINGER)
    assert all(said.empty() for said in run.said)


def test_who_does_not_come_is_named_to_all() -> None:
    port = watch.free_port()
    futures = together(
        lambda: watch.gather(port, 4, 0, seconds=1.0), lambda: watch.come(("localhost", port), 2, 4)
    )
    for future in futures:
        with pytest.raises(
            OSError,
            match=r"^all 4 processes must come within 1 s: 1, 3 did not; start them together$",
        ):
            future.result()


def test_process_0_must_be_there() -> None:
    port = watch.free_port()
    with pytest.raises(
        TimeoutError,
        match=rf"^process 0 must answer at localhost:{port} within 0.5 s: got .*; start all together$",
    ):
        watch.come(("localhost", port), 1, 2, seconds=0.5)


def test_who_leaves_before_all_have_come_is_missed_at_once() -> None:
    port = watch.free_port()

    def leave() -> None:
        link = watch.Link(watch.reach(("localhost", port), 10.0))
        link.say(process=1, processes=4, host="a")
        time.sleep(0.5)  # heard by then
        link.close()

    first, second, _ = together(
        lambda: watch.gather(port, 4, 0), lambda: watch.come(("localhost", port), 2, 4), leave
    )
    for future in (first, second):
        with pytest.raises(
            ConnectionError, match=r"^process 1 of 4 \(host a\) is gone; this one stops too$"
        ):
            future.result()


@pytest.mark.parametrize(("process", "count"), [(1, 2), (1, 3), (2, 2)])
def test_a_number_is_given_once(process: int, count: int) -> None:
    """Process 1 of 2 is there, and another one comes that calls itself so, or counts otherwise."""
    port = watch.free_port()

    def stray() -> Any:
        time.sleep(0.5)
        with pytest.raises(
            ValueError,
            match=rf"^processes must be 0 to 2, each once: got another process {process} of {count}$",
        ):
            watch.come(("localhost", port), process, count)
        return watch.come(("localhost", port), 2, 3)  # now all are there

    close(
        together(
            lambda: watch.gather(port, 3, 0), lambda: watch.come(("localhost", port), 1, 3), stray
        )
    )


@pytest.mark.parametrize(
    "words",
    [b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": [1], "processes": 2, "host": "a"}\n'],
)
def test_strangers_do_not_matter(words: bytes) -> None:
    port = watch.free_port()

    def stranger() -> Any:
        with watch.reach(("localhost", port), 10.0) as channel:
            channel.sendall(words)
            channel.shutdown(socket.SHUT_WR)
            assert channel.recv(1) == b""  # answered by a farewell
        return watch.come(("localhost", port), 1, 2)

    close(together(lambda: watch.gather(port, 2, 0), stranger))


def test_a_port_in_use_is_said() -> None:
    with (
        watch._listener(0) as taken,
        pytest.raises(
            OSError,
            match=r"^process 0 must be able to listen on port \d+: got Address already in use$",
        ),
    ):
        watch.gather(taken.getsockname()[1], 2, 0)


def test_a_shield_passes_everything_on_and_outlives_what_is_behind_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        near = socket.create_connection(
            ("127.0.0.1", watch.shield(service.getsockname())), timeout=20
        )
        far = service.accept()[0]
    near.sendall(b"question")
    assert far.recv(99) == b"question"
    far.sendall(b"answer")
    assert near.recv(99) == b"answer"
    far.close()
    near.settimeout(0.5)
    for question in (b"a second", b"a third", b"a fourth"):
        with pytest.raises(TimeoutError):  # silence, where a closed connection reads as b""
            near.recv(1)
        near.sendall(question)
    near.close()


def test_a_shield_closes_what_is_behind_it_after_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        near = socket.create_connection(
            ("127.0.0.1", watch.shield(service.getsockname())), timeout=20
        )
        far = service.accept()[0]
    near.close()
    far.settimeout(20)
    assert far.recv(1) == b""
    far.close()
