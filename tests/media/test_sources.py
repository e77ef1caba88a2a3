"""Pictures from bytes, open files and addresses."""

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import one_line, picture
from PIL import Image

from cogi2v_jax.media import download
from cogi2v_jax.media.images import local_copy, read_image


def encoded(format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_the_bytes_of_a_file_are_read_as_the_file(kind: Any) -> None:
    np.testing.assert_array_equal(read_image(kind(encoded())), picture())


def test_an_open_file_is_read_and_left_open(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded())
    with (tmp_path / "x.png").open("rb") as file:
        for _ in range(2):  # as for two videos of a batch
            np.testing.assert_array_equal(read_image(file), picture())
        assert not file.closed


@pytest.mark.parametrize("head", ["data:image/png;base64,", " DATA:;base64,"])
def test_a_data_address_is_read(head: str) -> None:
    address = head + base64.b64encode(encoded()).decode()
    np.testing.assert_array_equal(read_image(address), picture())


@pytest.mark.parametrize("head", ["file://", "file:", " FILE://localhost"])
def test_a_file_address_is_its_path(head: str, tmp_path: Path) -> None:
    (tmp_path / "a 猫.png").write_bytes(encoded())
    np.testing.assert_array_equal(read_image(f"{head}{tmp_path}/a%20猫.png"), picture())
    with pytest.raises(FileNotFoundError, match=f"existing file: got {tmp_path}/none.png"):
        read_image(f"{head}{tmp_path}/none.png")


@pytest.mark.parametrize(
    ("address", "named"),
    [
        *((address, address) for address in ("gs://b/x.png", "s3://b/x.png", "FTP://h/x.png")),
        ("file://elsewhere/x.png", "file://elsewhere/x.png"),
        (" http://me:secret@h/x.png", "http://...@h/x.png"),
    ],
)
def test_another_address_is_named_with_a_way_out(address: str, named: str) -> None:
    with pytest.raises(ValueError, match="at a http, https or data address") as refused:
        read_image(address)
    assert one_line(refused).endswith(f": got {named}; download it first")


@pytest.mark.parametrize(
    "source", [b"", b"no picture", "data:image/png,abc", "data:;base64,!", io.StringIO("x")]
)
def test_bytes_that_are_no_picture_are_refused_in_one_line(source: Any) -> None:
    with pytest.raises(ValueError, match="must") as refused:
        read_image(source)
    one_line(refused)


@pytest.mark.parametrize("source", [None, object(), {"a": 1}])
def test_what_is_no_picture_at_all_is_told_what_may_be_given(source: Any) -> None:
    with pytest.raises(ValueError, match="image must be a path, an address, bytes") as refused:
        read_image(source)
    one_line(refused)


def test_a_pointer_of_git_lfs_is_named_as_one(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "x.png").write_bytes(pointer)
    with pytest.raises(ValueError, match=r"got .*x.png, a git-lfs pointer; fetch the file"):
        read_image(tmp_path / "x.png")


def test_heic_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogi2v_jax.media.images.find_spec", lambda name: None)
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(ValueError, match=r"got HEIC in .*; pip install pillow-heif, or save it as"):
        read_image(tmp_path / "x.heic")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        match self.path:
            case "/picture" | "/%E7%8C%AB.png" | "/%2e%2e" | "/a%00b.png":
                self.answer(200, encoded())
            case "/moved":
                self.answer(302, b"", Location="/picture")
            case "/loop":
                self.answer(302, b"", Location="/loop")
            case "/away":
                self.answer(302, b"", Location="file:///etc/hostname")
            case "/elsewhere":
                self.answer(302, b"", Location="ftp://127.0.0.1/picture")
            case "/secret":
                self.answer(302, b"", Location="http://me:secret@127.0.0.1/picture")
            case "/drops":
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX-A: ")
                with suppress(OSError):  # until the other end is gone
                    for _ in range(40):
                        self.wfile.write(b"a")
                        threading.Event().wait(0.05)
            case "/slow":
                self.send_response(200)
                self.end_headers()
                threading.Event().wait(1.0)
            case "/page":
                self.answer(200, b"<html></html>")
            case _:
                self.answer(404, b"")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize("path", ["/picture", "/moved", "/猫.png"])
@pytest.mark.parametrize("scheme", ["http", " HTTP"])
def test_a_picture_at_an_address_is_fetched(scheme: str, path: str, server: str) -> None:
    address = server.replace("http", scheme) + path
    np.testing.assert_array_equal(read_image(address), picture())


@pytest.mark.parametrize(
    ("path", "name"),
    [("/picture", "picture"), ("/%2e%2e", "image"), ("/a%00b.png", r"a\x00b.png")],
)
def test_a_copy_of_what_is_at_an_address_has_its_name(
    path: str, name: str, server: str, tmp_path: Path
) -> None:
    copy = local_copy(server + path, tmp_path)
    assert copy.name == name
    np.testing.assert_array_equal(read_image(copy), picture())


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/none", "Not Found"),
        ("/loop", "infinite loop\\.$"),
        ("/secret", r"leads to http://\.\.\.@127.0.0.1/picture$"),
        ("/away", "not allowed"),
        ("/elsewhere", "leads to ftp"),
    ],
)
def test_what_cannot_be_fetched_is_an_error_that_names_the_address(
    path: str, why: str, server: str
) -> None:
    with pytest.raises(OSError, match=f"cannot download {server}{path}: .*{why}") as refused:
        read_image(server + path)
    assert "\n" not in str(refused.value)


def test_a_page_is_no_picture_and_named_by_its_address(server: str, tmp_path: Path) -> None:
    for read in (read_image, lambda address: local_copy(address, tmp_path)):
        with pytest.raises(ValueError, match=rf": got {server}/page \(unknown format\); try"):
            read(f"{server}/page")


def test_more_bytes_than_the_limit_are_not_fetched(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "LARGEST", 100)
    with pytest.raises(ValueError, match="image must have at most 0 MiB: got more from http"):
        read_image(f"{server}/picture")


def test_an_address_that_does_not_answer_is_given_up(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SECONDS", 0.2)
    with pytest.raises(OSError, match=f"cannot download {server}/slow: timed out"):
        read_image(f"{server}/slow")


def test_headers_that_come_in_drops_are_given_up(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SECONDS", 0.3)
    with pytest.raises(OSError, match=f"cannot download {server}/drops: it took more than 0 s"):
        read_image(f"{server}/drops")


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://", "no host given"),
        ("http://[::1/x", "Invalid IPv6 URL"),
        ("http://h:x/", "nonnumeric port: 'x'"),
    ],
)
def test_a_broken_address_is_an_error_of_one_line(address: str, why: str) -> None:
    with pytest.raises(OSError, match="cannot download") as refused:
        read_image(address)
    assert str(refused.value) == f"cannot download {address}: {why}"
