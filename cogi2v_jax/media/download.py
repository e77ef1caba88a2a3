"""Pictures at addresses: of the web, within limits, and with their data in them."""

import base64
import binascii
import os
import re
import string
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from ..disk import one_line
from ..names import scheme_of

WEB = ("http", "https")
# A path alone, or that of this machine; what is at file://elsewhere/ is not here.
HERE = re.compile(r"file:(?://(?:localhost)?(?=/))?(?!//)(.+)", re.IGNORECASE)
PASSWORD = re.compile(r"(?<=://)[^/?#\s]*@")  # and the user before it
LARGEST = 100 * 2**20  # bytes
SECONDS = 60.0  # for all of it; half of them without a byte are too many
REDIRECTS = 5
BLOCK = 2**16

Value = TypeVar("Value")


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any):
        if scheme_of(newurl) not in WEB or has_password(newurl):
            fp.close()
            raise urllib.error.URLError(f"it leads to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def path_or_address(text: str) -> Path | str:
    """A path, also of a file address, or another address without the blanks around it: a path would
    lose one of its slashes."""
    if not scheme_of(text):
        return Path(text)
    here = HERE.fullmatch(text.strip())
    return Path(unquote(here[1], errors="surrogateescape")) if here else text.strip()


def shown(address: str) -> str:
    """An address for a message: in one line, without a password."""
    if scheme_of(address) == "data":
        return "a data address"
    return PASSWORD.sub("...@", one_line(address))


def file_name(address: str) -> str:
    """A name for the file at an address."""
    path = urlsplit(address).path if scheme_of(address) in WEB else ""
    name = one_line(PurePosixPath(unquote(path)).name)
    return "image" if name in ("", "..") else os.fsencode(name)[-200:].decode(errors="ignore")


def fetch(address: str) -> bytes:
    """The bytes at a http, https or data address. Raises ValueError for another one, for what is no
    base64 and for more than LARGEST bytes, OSError for what can't be downloaded, in one line."""
    scheme = scheme_of(address)
    if scheme == "data":
        return _data(address)
    if scheme not in WEB or has_password(address):
        rule = "image must be a file, or at a http, https or data address without a password"
        raise ValueError(f"{rule}: got {shown(address)}; download it first")
    try:
        return within(SECONDS, lambda: _download(address))
    except TimeoutError as error:
        raise OSError(f"cannot download {shown(address)}: {error}") from None


def within(seconds: float, work: Callable[[], Value]) -> Value:
    """What `work` returns or raises. Raises TimeoutError where that takes more than `seconds`: a
    timeout of urllib begins anew with every byte, and looking up a name has none."""
    done: Future[Value] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done.done():
        raise TimeoutError(f"it took more than {seconds:.0f} s")
    return done.result()


def read_answer(answer: Any, most: int, end: float) -> bytes:
    """The bytes of an answer; somewhat more than `most` where it has more. Raises TimeoutError at
    the time `end`, when nobody waits any more, and as the connection."""
    data = bytearray()
    while len(data) <= most and (block := answer.read1(BLOCK)):
        data += block
        if time.monotonic() > end:
            raise TimeoutError
    return bytes(data)


def _data(address: str) -> bytes:
    """The bytes of a data address, as pages and programs pass pictures."""
    head, _, text = address.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"data address must be base64: got {one_line(address[:40])}...") from None


def has_password(address: str) -> bool:
    return bool(PASSWORD.match(address, address.find("://") + 3))


def _download(address: str) -> bytes:
    end = time.monotonic() + SECONDS
    quoted = quote(address, safe=string.punctuation)  # letters beyond ASCII
    try:
        request = urllib.request.Request(quoted, headers={"User-Agent": "cogi2v-jax"})
        with urllib.request.build_opener(_Redirects).open(request, timeout=SECONDS / 2) as answer:
            data = read_answer(answer, LARGEST, end)
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        why = str(getattr(error, "reason", None) or str(error) or type(error).__name__)
        why = PASSWORD.sub("...@", one_line(why.partition("\n")[0]))
        raise OSError(f"cannot download {shown(address)}: {why}") from None
    if len(data) > LARGEST:
        most = f"image must have at most {LARGEST >> 20} MiB"
        raise ValueError(f"{most}: got more from {shown(address)}")
    return data
