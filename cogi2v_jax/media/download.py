"""Pictures at web addresses, within limits."""

import os
import string
import tempfile
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ..disk import one_line

SCHEMES = ("http://", "https://")
LARGEST = 100 * 2**20  # bytes
SECONDS = 60.0  # for all of it; half of them without a byte are too many
REDIRECTS = 5
BLOCK = 2**16


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any):
        if not newurl.startswith(SCHEMES):
            fp.close()
            raise urllib.error.URLError(f"it leads to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def path_or_address(text: str) -> Path | str:
    """A path, or an address as it is: a path would lose one of its slashes."""
    return text if text.startswith(SCHEMES) else Path(text)


def local_copy(source: Path | str, folder: Path) -> Path:
    """A path itself, or the file at an address, in a new folder in `folder`."""
    if isinstance(source, Path):
        return source
    name = PurePosixPath(unquote(urlsplit(source).path)).name or "image"
    copy = Path(tempfile.mkdtemp(dir=folder), os.fsencode(name)[-200:].decode(errors="ignore"))
    copy.write_bytes(download(source))
    return copy


def download(address: str) -> bytes:
    """The bytes at a http or https address. Raises OSError in one line for what can't be fetched,
    ValueError for more than LARGEST bytes."""
    end = time.monotonic() + SECONDS
    quoted = quote(address, safe=string.punctuation)  # letters beyond ASCII
    request = urllib.request.Request(quoted, headers={"User-Agent": "cogi2v-jax"})
    data = bytearray()
    try:
        with urllib.request.build_opener(_Redirects).open(request, timeout=SECONDS / 2) as answer:
            while block := answer.read1(BLOCK):
                data += block
                if len(data) > LARGEST:
                    most = f"image must have at most {LARGEST >> 20} MiB"
                    raise ValueError(f"{most}: got more from {address}")
                if time.monotonic() > end:
                    raise TimeoutError(f"it took more than {SECONDS:.0f} s")
    except (OSError, HTTPException, UnicodeError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        why = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise OSError(f"cannot download {address}: {one_line(str(why))}") from None
    return bytes(data)
