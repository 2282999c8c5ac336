"""Fetching shards over http(s) and from the Hugging Face hub, whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import re
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from huggingface_hub import HfApi, hf_hub_download
from rich.progress import Progress

from lcm_lightning.errors import UserError, short
from lcm_lightning.hub import hub_answers, hub_refusal
from lcm_lightning.output.files import sha256_of

log = logging.getLogger(__name__)

CHUNK = 1 << 20
ATTEMPTS = 5
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; doubled from attempt to attempt
TIMEOUT = 60.0  # seconds without a byte, or in which SLOWEST is judged
ANSWER = 120.0  # seconds in which a connection, redirections and all headers have to be there
SLOWEST = 1024  # bytes a second
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class DownloadError(UserError):
    """A file that a server does not give: one shard's misfortune, where others may be had."""


def is_url(location: str) -> bool:
    """True for http(s) and `hf://` addresses."""
    return location.startswith(("http://", "https://", "hf://"))


def list_hub_shards(repo: str) -> list[str]:
    """`hf://` addresses of the tar files of a hub data set. Raises `UserError` when the hub gives no answer."""
    try:
        if not hub_answers():
            raise ConnectionError
        files = HfApi().list_repo_files(repo, repo_type="dataset")
    except Exception as error:  # network, authentication and not-found errors of several libraries
        raise UserError(
            f"data.source={short(repo, 80)}: no such folder here, and {hub_refusal(error)}; check the path, or the id "
            "of the data set and HF_TOKEN"
        ) from error
    return [f"hf://datasets/{repo}/{file}" for file in files if file.endswith(".tar")]


def download(location: str, cache: Path, sha256: str | None = None, *, version: str | None = None) -> Path:
    """Local file of a shard, downloaded on first use.

    Args:
        sha256: that it must have, as its index says.
        version: what tells the content from another published at the same address later; `sha256` if None. Without
            either, what is in the cache is taken for the file.

    Raises:
        DownloadError: the server does not give it, or gives another file than its index speaks of.
        UserError: it cannot be written.
    """
    if location.startswith("hf://"):
        return download_from_hub(location)
    digest = hashlib.sha256(location.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "_", Path(urllib.parse.urlsplit(location).path).name)[-100:]
    shards = folder = cache / "shards"
    if (version := sha256 if version is None else version) is not None:
        # In a folder, since a file's name decides its samples' seeds.
        folder = shards / hashlib.sha256(str(version).encode()).hexdigest()[:16]
    path = folder / f"{digest}-{name}"
    if path.is_file():
        return path
    temporary = shards / f"{path.name}.{uuid4().hex}.tmp"  # process ids repeat from machine to machine
    try:
        shards.mkdir(parents=True, exist_ok=True)
        found = fetch_file(location, temporary)
        if sha256 not in (None, found):
            raise DownloadError(f"{location}: the file does not have the sha256 of its index; publish both together")
        folder.mkdir(exist_ok=True)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"data.cache_dir={cache}: cannot be written ({error}); set it to a folder with room") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def download_from_hub(location: str) -> Path:
    """Local file of `hf://datasets/<owner>/<name>[@revision]/<path>`, in the hub's own cache."""
    match = re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", location)
    if match is None:
        raise UserError(f"data.source={location}: expected hf://datasets/<owner>/<name>/<file>.tar")
    repo, revision, file = match.groups()
    try:
        cached = not hub_answers()
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_files_only=cached))
    except Exception as error:  # network, authentication and not-found errors of several libraries
        raise DownloadError(f"data.source={location}: download failed ({hub_refusal(error)})") from error


def fetch_file(address: str, path: Path) -> str:
    """Download `address` to `path` with a progress bar, trying again with growing pauses; the sha256 of the bytes.

    A connection that drops is taken up where it broke where the server can do that (RFC 9110, section 14.2).

    Raises:
        DownloadError: the server refuses, or fails `ATTEMPTS` times.
        OSError: the file cannot be written.
    """
    with path.open("wb") as file, Progress(transient=True) as progress:
        bar = progress.add_task(Path(address).name, total=None)
        version: dict[str, str] = {}
        for attempt in range(1, ATTEMPTS + 1):
            try:
                fetch_rest(
                    address, file, version, lambda done, total: progress.update(bar, completed=done, total=total)
                )
                break
            except NETWORK_ERRORS as error:
                seconds = pause(error, attempt)
                if attempt == ATTEMPTS or seconds is None:
                    tries = f" after {attempt} attempts" if attempt > 1 else ""
                    raise DownloadError(f"data.source={address}: download failed{tries} ({error})") from error
                log.warning("%s: %s; trying again in %.1f s (%d of %d)", address, error, seconds, attempt, ATTEMPTS)
                time.sleep(seconds)
    return sha256_of(path)


def fetch_rest(
    address: str, file: IO[bytes], version: dict[str, str], on_progress: Callable[[int, int | None], None]
) -> None:
    """Append what `file` lacks of `address`. Raises one of `NETWORK_ERRORS` when the server does not give it all.

    Args:
        version: the header "If-Range" once the server has told a version; then it sends the rest of that one, or all of
            another (RFC 9110, section 13.1.5).
    """
    had = file.tell()
    request = urllib.request.Request(address, headers={"Range": f"bytes={had}-", **version} if had else {})
    with answer_to(request) as response:
        if had and not response.headers.get("Content-Range", "").startswith(f"bytes {had}-"):  # it sends all again
            file.seek(0)
            file.truncate()
            had = 0
        if not had:
            version.clear()
            if tag := strong_validator(response.headers.get("ETag", "")):
                version["If-Range"] = tag
        length = response.headers.get("Content-Length")
        total = had + int(length) if length and length.isdigit() else None
        started = time.monotonic()
        while chunk := receive(response):
            file.write(chunk)
            on_progress(file.tell(), total)
            elapsed = time.monotonic() - started
            if elapsed > TIMEOUT and file.tell() - had < SLOWEST * elapsed:
                raise TimeoutError(f"slower than {SLOWEST} bytes/s")
    if total is not None and file.tell() != total:
        raise ConnectionError(f"the connection closed after {file.tell()} of {total} bytes")


class Redirections(urllib.request.HTTPRedirectHandler):
    """Follows without reading what comes with a redirection, of which a server can send without end."""

    def redirect_request(self, request: Any, response: Any, *others: Any) -> urllib.request.Request | None:
        """The next request."""
        following = super().redirect_request(request, response, *others)
        response.close()
        return following


def answer_to(request: urllib.request.Request) -> http.client.HTTPResponse:
    """The answer to a request once its headers are there.

    A socket's time-out is that of each byte, so the headers are waited for in a thread that can be left behind; it ends
    with its connection.

    Raises:
        TimeoutError: they are not there in `ANSWER` seconds.
        OSError, http.client.HTTPException: there is no connection, or no answer of 2xx.
    """
    answer: Future[http.client.HTTPResponse] = Future()

    def ask() -> None:
        try:
            answer.set_result(urllib.request.build_opener(Redirections).open(request, timeout=TIMEOUT))
        except BaseException as error:
            answer.set_exception(error)

    def close(late: Future[http.client.HTTPResponse]) -> None:
        if late.exception() is None:
            late.result().close()

    threading.Thread(target=ask, daemon=True).start()
    if not wait([answer], ANSWER).done:
        answer.add_done_callback(close)
        raise TimeoutError(f"no complete answer in {ANSWER:g} s")
    return answer.result()


def strong_validator(tag: str) -> str | None:
    """The entity tag of a file, None for a weak one or none: only a strong one promises the same bytes."""
    return tag if tag.startswith('"') else None


def receive(response: http.client.HTTPResponse) -> bytes:
    """What has arrived, b"" at the end: `read` would wait for a whole chunk, however slowly it trickles."""
    try:
        return response.read1(CHUNK)
    except OSError as error:
        raise ConnectionError(str(error) or type(error).__name__) from error


def pause(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before trying again, as the server wishes (at most `LONGEST_PAUSE`); None: trying is no use."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code not in (408, 429) and error.code < 500:
            return None
        wish = error.headers.get("Retry-After", "")
        if wish.isdigit():
            return min(float(wish), LONGEST_PAUSE)
    elif isinstance(getattr(error, "reason", None), socket.gaierror | ConnectionRefusedError):
        return None  # nobody is there
    return min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)


def fetch_json(address: str) -> Any:
    """The JSON document at an address. Raises `UserError`."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "document.json"
            fetch_file(address, path)
            return json.loads(path.read_bytes())
    except DownloadError as error:
        raise UserError(f"{error}; no index of prepared shards there") from error
    except ValueError as error:
        raise UserError(f"data.source={address}: no index of prepared shards there ({error})") from error
