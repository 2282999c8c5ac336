"""Fetching shards over http(s) and from the Hugging Face hub, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from uuid import uuid4

from huggingface_hub import HfApi, hf_hub_download
from rich.progress import Progress

from lcm_lightning.errors import UserError

CHUNK = 1 << 20


def is_url(location: str) -> bool:
    """True for http(s) and `hf://` addresses."""
    return location.startswith(("http://", "https://", "hf://"))


def list_hub_shards(repo: str) -> list[str]:
    """`hf://` addresses of the tar files of a hub data set. Raises `UserError` when the hub gives no answer."""
    try:
        files = HfApi().list_repo_files(repo, repo_type="dataset")
    except Exception as error:  # network, authentication and not-found errors of several libraries
        raise UserError(
            f"data.source={repo}: neither a folder here nor a data set the Hugging Face hub would list "
            f"({type(error).__name__}: {first_line(error)}); check the path, the id, the network and HF_TOKEN"
        ) from error
    return [f"hf://datasets/{repo}/{file}" for file in files if file.endswith(".tar")]


def download(location: str, cache: Path, sha256: str | None = None) -> Path:
    """Local file of a shard, downloaded on first use. Raises `UserError` when that fails."""
    if location.startswith("hf://"):
        return download_from_hub(location)
    digest = hashlib.sha256(location.encode()).hexdigest()[:16]
    path = cache / "shards" / f"{digest}-{Path(location).name}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")  # process ids repeat from machine to machine
        try:
            found = stream_to_file(location, temporary)
            if sha256 not in (None, found):
                raise UserError(f"{location}: the file does not have the sha256 of its index; publish both together")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def download_from_hub(location: str) -> Path:
    """Local file of `hf://datasets/<owner>/<name>[@revision]/<path>`, in the hub's own cache."""
    match = re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", location)
    if match is None:
        raise UserError(f"data.source={location}: expected hf://datasets/<owner>/<name>/<file>.tar")
    repo, revision, file = match.groups()
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))
    except Exception as error:  # network, authentication and not-found errors of several libraries
        raise UserError(f"data.source={location}: download failed ({first_line(error)})") from error


def stream_to_file(address: str, path: Path) -> str:
    """Download `address` to `path` with a progress bar; returns the sha256 of the bytes.

    Raises:
        UserError: the server refuses, or closes the connection before the length it announced.
    """
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(address, timeout=60) as response, path.open("wb") as file, Progress() as progress:
            length = response.headers.get("Content-Length")
            bar = progress.add_task(Path(address).name, total=int(length) if length else None)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                progress.update(bar, advance=len(chunk))
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"data.source={address}: download failed ({error})") from error
    if length and path.stat().st_size != int(length):
        raise UserError(f"data.source={address}: the connection closed after {path.stat().st_size} of {length} bytes")
    return digest.hexdigest()


def fetch_json(address: str) -> Any:
    """The JSON document at an address. Raises `UserError`."""
    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            return json.load(response)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(f"data.source={address}: no index of prepared shards there ({error})") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [""])[0]
