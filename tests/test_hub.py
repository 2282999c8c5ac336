"""The Hugging Face hub out of reach: a path that looks like an id is refused in one short sentence, at once."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from lcm_lightning import hub
from lcm_lightning.data.downloads import download
from lcm_lightning.data.sources import read_source
from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.features import Clip
from lcm_lightning.models.lora_files import locate_lora
from lcm_lightning.models.stable_diffusion import load_stable_diffusion

PLACE = "outputs/foo"
ASKED: dict[str, Callable[[], object]] = {
    "model.path": lambda: load_stable_diffusion(PLACE),
    "lora": lambda: locate_lora(PLACE),
    "data.source": lambda: read_source(PLACE, "folder"),
    "evaluation.clip": lambda: Clip(PLACE),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[None]:
    """A machine that has asked nobody yet and is not told to be offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._is_reachable.cache_clear()
    yield
    hub._is_reachable.cache_clear()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address where no hub listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")


@pytest.mark.parametrize("key", ASKED)
def test_a_mistyped_path_is_refused_in_a_sentence_at_once_where_no_hub_is(key: str, nobody: None):
    started = time.monotonic()
    with pytest.raises(UserError) as refusal:
        ASKED[key]()
    message = str(refusal.value)
    assert message.startswith(f"{key}={PLACE}: ") and len(message) <= 300 and "\n" not in message
    assert time.monotonic() - started < 15  # on a machine busy with other things; the library would take 24 to 70


def test_a_hub_that_was_away_for_a_moment_is_asked_again(nobody: None, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(hub, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None))
    assert not hub.hub_answers()
    monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(head=lambda address, timeout: None))
    assert not hub.hub_answers()
    now[0] = hub.REMEMBERED
    assert hub.hub_answers()


def test_a_shard_of_the_hub_is_given_up_at_once_where_no_hub_is(nobody: None, tmp_path):
    with pytest.raises(UserError, match=r"download failed \(the hub cannot be reached"):
        download("hf://datasets/owner/name/0.tar", tmp_path)


def test_the_hub_is_asked_once(nobody: None, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(hub, "get_session", lambda: asked.append(1))
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    assert not hub.hub_answers() and not hub.hub_answers()
    assert len(asked) == 1


def test_a_hub_that_refuses_answers_all_the_same(monkeypatch: pytest.MonkeyPatch):
    class Refusal(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.hub_answers()
        server.shutdown()


def test_nobody_is_asked_offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "get_session", lambda: pytest.fail("asked"))
    assert not hub.hub_answers()
