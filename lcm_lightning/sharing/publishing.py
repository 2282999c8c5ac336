"""A run's export as a repository of the Hugging Face hub.

All files go in one commit, the last request of all: nobody sees half of them. What was sent before a push broke off
lies on the hub under its hash, and is not sent again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from omegaconf import OmegaConf

from lcm_lightning.errors import UserError, first_line, short
from lcm_lightning.hub import hub_answers, is_repo_id
from lcm_lightning.models.kinds import KOHYA_FILE, LORA_FILE, TEACHER_FILE
from lcm_lightning.output.visible_files import CARD, EVALUATION_GRID, PICTURES, visible_files
from lcm_lightning.runs.contents import MANIFEST, exported
from lcm_lightning.sharing.model_card import (
    MARK,
    CardSettings,
    error_line,
    evaluation_of,
    write_card,
)
from lcm_lightning.sharing.redaction import HIDDEN, public_config, public_text, refuse_secrets
from lcm_lightning.sharing.training_facts import settings_of_run

log = logging.getLogger(__name__)

T = TypeVar("T")

TEXTS = (".json", ".md", ".txt", ".yaml")
NOT_OURS = (".gitattributes", CARD)  # what a repository may hold that was made by hand on the hub
# What a push may have brought before, and takes away where it is no more: files, and folders.
OUR_FILES = (LORA_FILE, KOHYA_FILE, TEACHER_FILE, EVALUATION_GRID, "metrics.json", "config.yaml", "model_index.json")
OUR_FOLDERS = (PICTURES, "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
TOKENS = "https://huggingface.co/settings/tokens"
ATTEMPTS = 3  # where the hub is in trouble; its library tries most of its requests six times by itself
AGAIN = "give the same command again, and what has arrived is not sent twice"


@dataclass(frozen=True)
class Push:
    """Where a run is published.

    Attributes:
        repo_id: owner and name.
        private: whether only its owner sees it.
        revision: branch; None for the main one.
        message: of the commit.
        create_pr: open a pull request in the place of committing.
    """

    repo_id: str
    private: bool = True
    revision: str | None = None
    message: str | None = None
    create_pr: bool = False


def push_run(run: Path, push: Push, card: CardSettings) -> str:
    """Publish what `run` has exported, with its card; the address to look at.

    Raises:
        UserError: there is nothing to publish, or the hub does not take it; says which, and what to do.
    """
    check_repo_id(push.repo_id)
    token = get_token()
    if token is None:
        raise UserError(
            f"push_to_hub={push.repo_id}: there is no access token; make one with write access at {TOKENS} and give it "
            "to `hf auth login`, or set HF_TOKEN"
        )
    try:
        files = publication(run, card)
    except UserError:
        raise
    except Exception as error:  # of damaged pictures, records and cards, or a folder that may not be written to
        raise UserError(
            f"push_to_hub={push.repo_id}: the run cannot be made ready to publish ({error_line(error)[:160]}); mend "
            "that, or remove the damaged file"
        ) from error
    if not hub_answers():
        offline = "HF_HUB_OFFLINE is set; unset it" if constants.HF_HUB_OFFLINE else f"try later: {AGAIN}"
        raise UserError(f"push_to_hub={push.repo_id}: the hub cannot be reached; {offline}")
    try:
        return send(HfApi(token=token), push, files)
    except UserError:
        raise
    except Exception as error:  # of the hub's library, and of those for http that its versions use
        raise UserError(f"push_to_hub={push.repo_id}: {refusal(error, push).replace(token, HIDDEN)}") from error


def check_repo_id(repo_id: str) -> None:
    """Raise a `UserError` unless `repo_id` is an owner and a name that the hub would take."""
    if not is_repo_id(repo_id):
        raise UserError(
            f"push_to_hub={short(repo_id, 100)}: expected OWNER/NAME of letters, digits, '-', '_' and '.', such as "
            "push_to_hub=me/lcm-lora-flickr8k"
        )


def publication(run: Path, card: CardSettings) -> dict[str, bytes | Path]:
    """The files that a repository of `run` holds, by their paths there.

    Its export with a renewed card and pictures; of an evaluation its metrics.json; the run's config.yaml without
    secrets, loggers and local paths.

    Raises:
        UserError: the run has exported nothing, or a file holds a secret.
    """
    folder = exported(run)
    if folder is None:
        raise UserError(f"run={run}: no lora/{MANIFEST} there; the run ended before its first export, train it again")
    write_card(run, card)
    files: dict[str, bytes | Path] = {path.relative_to(folder).as_posix(): path for path in visible_files(folder)}
    files["config.yaml"] = OmegaConf.to_yaml(public_config(settings_of_run(run))).encode()
    if metrics := evaluation_of(run):
        files["metrics.json"] = (json.dumps(metrics, indent=2) + "\n").encode()
    for name, content in files.items():
        if name.endswith(TEXTS):
            text = content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")
            refuse_secrets(name, text)
    return files


def send(api: HfApi, push: Push, files: Mapping[str, bytes | Path]) -> str:
    """Make the repository where there is none, and commit what it lacks of `files`; the address to look at.

    Raises:
        UserError: the repository is another one than is meant.
        Exception: of the hub's library.
    """
    present = patiently(lambda: prepare_repository(api, push))
    kept = [CARD] if CARD in present and not has_our_card(api, push) else []
    for name in kept:
        log.warning(
            "%s of %s is someone's own (without the line that says who renews it) and was kept", name, push.repo_id
        )
    ours = (name for name in present if name in OUR_FILES or name.partition("/")[0] in OUR_FOLDERS)
    stale = [name for name in ours if name not in files]

    def commit() -> str:
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, content) for name, content in files.items() if name not in kept),
            *(CommitOperationDelete(name) for name in stale),
        ]
        made = api.create_commit(
            push.repo_id,
            operations,
            commit_message=push.message or "Upload by lcm-lightning",
            revision=push.revision,
            create_pr=push.create_pr,
        )
        return made.pr_url or f"{api.endpoint}/{push.repo_id}"

    # A commit whose answer was lost is found done; a pull request would be opened twice.
    return commit() if push.create_pr else patiently(commit)


def prepare_repository(api: HfApi, push: Push) -> list[str]:
    """Make repository and branch where they are missing; the names of the files there.

    Raises:
        UserError: the repository may be seen by others, or by nobody else, against what `push` says; or it holds a
            model that is not of a run.
    """
    try:
        is_private = bool(api.repo_info(push.repo_id).private)
    except RepositoryNotFoundError:
        api.create_repo(push.repo_id, private=push.private, exist_ok=True)
        is_private = push.private
    if is_private != push.private:
        seen = "private" if is_private else "public"
        raise UserError(
            f"private={str(push.private).lower()}: {push.repo_id} is {seen} on the hub; set "
            f"private={str(is_private).lower()}, or change it in its settings there"
        )
    if push.revision is not None:
        api.create_branch(push.repo_id, branch=push.revision, exist_ok=True)
    present = api.list_repo_files(push.repo_id, revision=push.revision)
    others = [name for name in present if name not in NOT_OURS]
    if others and MANIFEST not in present:
        raise UserError(
            f"push_to_hub={push.repo_id}: holds other files ({short(', '.join(others), 80)}) and no {MANIFEST}, which "
            "a run's has; give another name"
        )
    return present


def has_our_card(api: HfApi, push: Push) -> bool:
    """Whether the card on the hub is one that is renewed."""
    try:
        file = api.hf_hub_download(push.repo_id, CARD, revision=push.revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return True
    return MARK in Path(file).read_text(encoding="utf-8")


def patiently(request: Callable[[], T]) -> T:
    """What `request` returns, made again where the hub is in trouble (5xx)."""
    for attempt in range(1, ATTEMPTS):
        try:
            return request()
        except HfHubHTTPError as error:
            if status_of(error) < 500:
                raise
            time.sleep(2**attempt)
    return request()


def http_error(error: BaseException) -> HfHubHTTPError | None:
    """The hub's answer in an error, or in what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return cause
        cause = cause.__cause__
    return None


def status_of(error: HfHubHTTPError) -> int:
    """The number that the hub answered with; 0 where it did not."""
    response: Any = error.response
    return 0 if response is None else int(response.status_code)


def refusal(error: BaseException, push: Push) -> str:
    """Why the hub did not take a push, and what to do, in one sentence."""
    owner, _ = push.repo_id.split("/")
    answer = http_error(error)
    status = 0 if answer is None else status_of(answer)
    message = (answer and answer.server_message) or first_line(answer or error)
    said = public_text(" ".join(message.split()))[:160]
    if status == 401:
        return (
            f"the hub does not know the access token; make one at {TOKENS} and give it to `hf auth login` or HF_TOKEN"
        )
    if status == 403:
        return f"the access token may not write there; give one with write access for {owner}, or an owner of yours"
    if status == 404:
        return "there is no such repository or branch, or the access token does not see it; check owner, name and token"
    if status == 409:
        return "the name is taken, or someone else is writing there; give another name, or the same command again"
    if status >= 500:
        return f"the hub is in trouble (it answered {status}); {AGAIN}"
    if status:
        return f"the hub refuses it: {said}"
    if isinstance(error, ValueError):  # of a head that the hub does not take
        return f"the hub refuses it: {public_text(' '.join(str(error).split()))[:200]}"
    return f"the connection broke ({said}); {AGAIN}"
