"""The Hugging Face hub, asked now and then whether it is there before libraries ask it again and again."""

from __future__ import annotations

import logging
import time
from functools import lru_cache

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from lcm_lightning.errors import first_line

ATTEMPTS = 2
TIMEOUT = 5.0  # seconds
REMEMBERED = 60.0  # seconds an answer counts: a run of hours must not go by one bad moment

for name in ("httpx", "httpx2"):  # which tell every request, and Hydra would print it
    logging.getLogger(name).setLevel(logging.WARNING)


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
