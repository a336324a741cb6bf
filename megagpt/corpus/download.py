"""Fetches a file over HTTP once: checksum, temporary name, a clear message without a network."""

from __future__ import annotations

import logging
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path

from megagpt.errors import DamageError, UsageError
from megagpt.files import file_sha256, whole_file

log = logging.getLogger("megagpt.data")
TIMEOUT_S = 60


def fetch(url: str, path: Path, sha256: str | None = None) -> Path:
    """`path`, downloaded from `url` unless it is there already.

    Raises UsageError when the download fails, DamageError when the content has another sha256.
    """
    if not path.exists():
        log.info("downloading %s", url)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(path) as file, urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                shutil.copyfileobj(answer, file)
                # Python's client takes an answer that breaks off for a whole one.
                size = answer.headers.get("Content-Length")
                if size is not None and file.tell() != int(size):
                    raise EOFError(f"it broke off after {file.tell()} of {size} bytes")
        except (OSError, HTTPException, ValueError, EOFError) as error:
            raise UsageError(
                f"{url} cannot be downloaded ({error}); download it elsewhere and put it at {path}"
            ) from None
    found = file_sha256(path)
    if sha256 and found != sha256:
        raise DamageError(
            f"{path}: sha256 {found[:12]}..., expected {sha256[:12]}...; remove it to "
            "download again"
        )
    return path
