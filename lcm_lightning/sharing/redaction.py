"""What of a run's records may be published: no secrets, and of paths on this machine the last name only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lcm_lightning.errors import UserError

HIDDEN = "(removed)"
SECRET_KEY = re.compile(r"(^|[_.-])(token|secret|passw(or)?d|api_?key|access_?key|credentials?)s?$", re.IGNORECASE)
SECRET_TEXT = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|wandb_v1_\w{16,}|sk-[A-Za-z0-9_-]{16,})")
WHOLE_PATH = re.compile(r"(~|/|\.\./|[A-Za-z]:[\\/]|\\\\)")
ADDRESS_OR_PATH = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\",\])}]+|(?<![\w.~/\\-])(?:~?/|[A-Za-z]:\\)[^\s'\",\])}]+")
PRIVATE = ("logger", "hydra", "resume", "run_dir")  # keys that say nothing of how the weights came about
LEAST = 8  # letters of an environment variable's value that is looked for


def public(value: Any) -> Any:
    """The same nest of mappings, sequences and texts, fit to be published."""
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if SECRET_KEY.search(str(key)) and isinstance(item, str) else public(item)
            for key, item in value.items()
        }
    if isinstance(value, str):
        return public_text(value)
    return [public(item) for item in value] if isinstance(value, Sequence) else value


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's resolved configuration, without where it was logged and written to."""
    return {key: public(item) for key, item in config.items() if key not in PRIVATE}


def public_overrides(overrides: Sequence[str]) -> list[str]:
    """What was typed after `train.py`, likewise."""
    shown = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if key.lstrip("+~").partition(".")[0].partition("/")[0] not in PRIVATE:
            shown.append(f"{key}{equals}{HIDDEN if SECRET_KEY.search(key) else public_text(value)}")
    return shown


def public_text(text: str) -> str:
    """`text` with the last name of each absolute path in it, addresses without credentials, and no secret."""
    text = SECRET_TEXT.sub(HIDDEN, text)
    for secret in environment_secrets():
        text = text.replace(secret, HIDDEN)
    if WHOLE_PATH.match(text) and "\n" not in text:
        return last_name(text)
    return ADDRESS_OR_PATH.sub(lambda found: _shortened(found[0]), text)


def last_name(path: str) -> str:
    """The last part of a path, of POSIX or Windows."""
    return PurePosixPath(path.replace("\\", "/")).name or HIDDEN


def _shortened(found: str) -> str:
    if "://" not in found:
        return last_name(found)
    address = urlsplit(found)
    if address.scheme == "file":
        return last_name(address.path)
    return urlunsplit((address.scheme, address.netloc.rpartition("@")[2], address.path, "", ""))  # a query may sign it


def environment_secrets() -> list[str]:
    """Values of environment variables that are called a token, a key or the like."""
    return [value for name, value in os.environ.items() if SECRET_KEY.search(name) and len(value) >= LEAST]


def refuse_secrets(name: str, content: str) -> None:
    """Raise a `UserError` where a file that is about to be published holds a secret, whoever wrote it."""
    if SECRET_TEXT.search(content) or any(secret in content for secret in environment_secrets()):
        raise UserError(f"push_to_hub: {name} holds an access token or key; remove it there, and revoke it")
