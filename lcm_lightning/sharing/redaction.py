"""What of a run's records may be published: no secrets, and of paths on this machine the last name only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

from lcm_lightning.errors import UserError

HIDDEN = "(removed)"
SECRET_KEY = re.compile(
    r"(^|[_.-])(token|secret|passw(or)?d|passphrase|(?<=[_.-])pwd|credential|signature|authorization|cookie|connection_?string"
    r"|(api|access|secret|private|account)_?key)s?$",
    re.IGNORECASE,
)
COUNT = re.compile(r"(^|[_.])(num|max|min|n)_tokens$")  # of a text encoder
SECRET_TEXT = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|wandb_v1_\w{16,}|sk-[A-Za-z0-9_-]{16,})")
WHOLE_PATH = re.compile(r"(~|/|\.\./|[A-Za-z]:[\\/]|\\\\)")
# An address runs to a blank, a quote or the next one: brackets, braces and commas may stand before its signature.
ADDRESS = r"\b[a-z][a-z0-9+.-]*://(?:(?!\b[a-z][a-z0-9+.-]*://)[^\s'\"])*"
IN_PATH = r"[^\s'\",\])}]*"
PATH = (
    r"(?<![\w.~/\\-])(?:file:/{0,2}/|(?:~[\w.-]*)?/|(?:\.\./)+|[A-Za-z]:[\\/]|\\\\)"
    rf"{IN_PATH}(?:(?: [\w.-]+){{1,3}}[\\/]{IN_PATH})*"  # a folder's name may have blanks
)
ADDRESS_OR_PATH = re.compile(f"{PATH}|{ADDRESS}")
PRIVATE = ("logger", "hydra", "resume", "run_dir")  # keys that say nothing of how the weights came about
LEAST = 8  # letters of an environment variable's value that is looked for


def public(value: Any) -> Any:
    """The same nest of mappings, sequences and texts, fit to be published."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if is_secret(str(key), item) else public(item) for key, item in value.items()}
    if isinstance(value, QuotedString):  # of Hydra's grammar
        return replace(value, text=public_text(value.text))
    if isinstance(value, str):
        return public_text(value)
    return [public(item) for item in value] if isinstance(value, Sequence) else value


def is_secret(key: str, value: Any) -> bool:
    """Whether a key says that its value, of whatever type, is nobody's business."""
    return SECRET_KEY.search(key) is not None and COUNT.search(key) is None and not isinstance(value, bool | None)


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's resolved configuration, without where it was logged and written to."""
    return public({key: item for key, item in config.items() if key not in PRIVATE})


def public_overrides(overrides: Sequence[str]) -> list[str]:
    """What was typed after `train.py`, likewise."""
    shown = (_public_override(text) for text in overrides)
    return [text for text in shown if text is not None]


def _public_override(text: str) -> str | None:
    """One of them; None where its key is private. Its value is read as Hydra reads it, nested keys and all."""
    key, equals, _ = text.partition("=")
    if key.lstrip("+~").partition(".")[0].partition("/")[0].partition("@")[0] in PRIVATE:
        return None
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return f"{key}{equals}{HIDDEN}"
    value = override._value
    if override.is_sweep_override() or is_secret(override.key_or_group, value):
        return f"{key}{equals}{HIDDEN}"
    told = public(value)
    return text if told == value else f"{key}{equals}{replace(override, _value=told).get_value_element_as_str()}"


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
    """A path's last name; an address without user, password and query, which may sign it."""
    scheme, is_address, rest = found.partition("://")
    if not is_address or scheme == "file" or rest.startswith("/"):
        return last_name(found)
    authority, slash, path = rest.partition("/")
    shown = re.split(r"[?#]", authority.rpartition("@")[2] + slash + path, maxsplit=1)
    brackets = re.search(r"[,;:\])}]*$", shown[1])[0] if len(shown) > 1 else ""  # type: ignore[index]  # matches any
    return f"{scheme}://{shown[0]}{brackets}"


def environment_secrets() -> list[str]:
    """Values of environment variables that are called a token, a key or the like."""
    return [value for name, value in os.environ.items() if SECRET_KEY.search(name) and len(value) >= LEAST]


def refuse_secrets(name: str, content: str) -> None:
    """Raise a `UserError` where a file that is about to be published holds a secret, whoever wrote it."""
    if SECRET_TEXT.search(content) or any(secret in content for secret in environment_secrets()):
        raise UserError(f"push_to_hub: {name} holds an access token or key; remove it there, and revoke it")
