"""The Hugging Face hub: what names a repository there, and whether it answers, before libraries ask again and again."""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id

from lcm_lightning.errors import first_line

ATTEMPTS = 2
TIMEOUT = 5.0  # seconds
REMEMBERED = 60.0  # seconds an answer counts: a run of hours must not go by one bad moment

for name in ("httpx", "httpx2"):  # which tell every request, and Hydra would print it
    logging.getLogger(name).setLevel(logging.WARNING)


def is_repo_id(text: str) -> bool:
    """Whether a text is OWNER/NAME as the hub takes it."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def is_hub_id(text: str) -> bool:
    """Whether what a setting names is to be looked for on the hub: OWNER/NAME, where nothing of that name lies here.

    A relative path of two parts looks the same; one that is mistyped is refused by the hub.
    """
    return is_repo_id(text) and not text.endswith(".safetensors") and not Path(text).exists()


def hub_answers() -> bool:
    """Whether the hub answers one short request, whatever it says; False in its offline mode.

    Its library makes every request six times over half a minute, several of them for one file, and a mistyped path
    looks like the id of a repository. Without an answer take what its cache holds: `local_files_only`.
    """
    return not constants.HF_HUB_OFFLINE and _is_reachable(constants.ENDPOINT, int(time.monotonic() / REMEMBERED))


@lru_cache(maxsize=1)
def _is_reachable(address: str, moment: int) -> bool:
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        try:
            get_session().head(address, timeout=TIMEOUT)  # through the proxy that the library would take
            return True
        except Exception:  # of the client for http, which changed from version to version of the library
            continue
    return False


def hub_refusal(error: BaseException) -> str:
    """Why the hub gave nothing, in a few words."""
    return f"the hub refuses it: {first_line(error)[:80]}" if hub_answers() else "the hub cannot be reached"
