"""Which W&B artifact a folder is: recorded where a run logs or downloads one, so that later runs can name it."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from lcm_lightning.errors import UserError, first_line
from lcm_lightning.output.files import write_atomic

RECORD = Path("wandb", "artifact.json")  # in a run's folder
SCHEME = "wandb:"
REFERENCE = re.compile(r"wandb:([\w.-]+)/([\w.-]+)/([\w.-]+):([\w.-]+)")
VERSION = re.compile(r"v\d+")
OFFLINE = ("offline", "dryrun", "disabled")
TYPES = ("lora", "model")


@dataclass(frozen=True)
class ArtifactRecord:
    """An artifact that holds what a run exported.

    Attributes:
        name: without entity, project and alias.
        alias: that no other version of it has.
        type: "lora" or "model".
        folder: of the run's folder, whose content it is.
        entity, project: None where it was logged offline by a user that is not known yet.
    """

    name: str
    alias: str
    type: str
    folder: str
    entity: str | None = None
    project: str | None = None

    @property
    def path(self) -> str | None:
        """What W&B calls it; None where that is not known yet."""
        return f"{self.entity}/{self.project}/{self.name}:{self.alias}" if self.entity and self.project else None


def write_record(run: Path, record: ArtifactRecord) -> None:
    """Keep it in a run's folder. Raises `OSError`."""
    write_atomic(run / RECORD, (json.dumps(asdict(record), indent=2) + "\n").encode())


def read_record(run: Path) -> ArtifactRecord | None:
    """That of a run's folder; None where no artifact was logged of it."""
    try:
        return ArtifactRecord(**json.loads((run / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def safe_name(text: str) -> str:
    """A text as a name of artifacts, which takes letters, digits, `-`, `_` and `.`, at most 128 of them."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:128]


def download_root() -> Path:
    """Where artifacts are downloaded to: W&B's own setting, or else beside the runs."""
    return Path(os.environ.get("WANDB_ARTIFACT_DIR") or "outputs/artifacts")


def download(reference: str, key: str) -> Path:
    """Fetch `wandb:entity/project/name:alias`; the folder looks like that of the run that logged it.

    A version that is there already is not fetched again, and nobody is asked for it; which one another alias means is
    asked each time.

    Args:
        key: the setting that gave `reference`.

    Raises:
        UserError: it is written otherwise, there is no way to W&B, no such artifact, or one that holds no LoRA.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(
            f"{key}={reference}: expected wandb:ENTITY/PROJECT/NAME:ALIAS, such as wandb:team/lcm-lightning/"
            "lora-1a2b3c4d:best, as the artifact's page on W&B says it"
        )
    entity, project, name, alias = match.groups()
    place = download_root() / entity / project / name
    if VERSION.fullmatch(alias) and (place / alias).is_dir():  # a version never changes
        return place / alias
    artifact = find(reference, key, instead(reference, place))
    folder = place / artifact.version
    if not folder.is_dir():
        fetch(artifact, folder, key, reference)
    return folder


def instead(reference: str, place: Path) -> str:
    """What works without W&B: the newest version in `place`, or else a run's folder."""
    versions = [path.name for path in place.glob("v*") if VERSION.fullmatch(path.name)]
    if not versions:
        return "a run's folder"
    newest = max(versions, key=lambda version: int(version[1:]))
    return f"{reference.rpartition(':')[0]}:{newest}, which is here"


def find(reference: str, key: str, instead: str = "a run's folder") -> Any:
    """W&B's artifact of that name. Raises a `UserError` that says what to give `instead`."""
    if (mode := os.environ.get("WANDB_MODE")) in OFFLINE:
        raise UserError(f"{key}={reference}: WANDB_MODE={mode} fetches nothing; unset it, or give {instead}")
    if not has_wandb_key():
        raise UserError(f"{key}={reference}: W&B wants an API key; `wandb login` once, or give {instead}")
    import wandb

    try:
        artifact = wandb.Api().artifact(reference.removeprefix(SCHEME))
    except Exception as error:  # of network, rights and names, by several libraries
        raise UserError(
            f"{key}={reference}: W&B gives no such artifact ({first_line(error)}); copy its name from its page, or "
            f"give {instead}"
        ) from error
    if artifact.type not in TYPES:
        raise UserError(
            f"{key}={reference}: an artifact of type {artifact.type}; expected one of type lora, which a run logs"
        )
    return artifact


def fetch(artifact: Any, folder: Path, key: str, reference: str) -> None:
    """Download an artifact into a new folder, whole or not at all. Raises `UserError`."""
    inner = "lora" if artifact.type == "lora" else "pipeline"
    partial = folder.with_name(f".{folder.name}.{uuid4().hex}")
    try:
        artifact.download(root=str(partial / inner))
        name = artifact.name.partition(":")[0]
        record = ArtifactRecord(name, artifact.version, artifact.type, inner, artifact.entity, artifact.project)
        write_record(partial, record)
        if not folder.is_dir():  # another process was faster
            partial.rename(folder)
    except Exception as error:
        raise UserError(
            f"{key}={reference}: could not be downloaded to {folder} ({first_line(error)}); try again, or give a run's "
            "folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def has_wandb_key() -> bool:
    """Whether W&B's key is at hand: in `WANDB_API_KEY`, W&B's settings, or the netrc file `wandb login` writes."""
    import netrc
    from urllib.parse import urlparse

    import wandb  # late: only who chose it waits for it

    settings = wandb.Settings()
    if os.environ.get("WANDB_API_KEY") or settings.api_key:
        return True
    try:
        return netrc.netrc().authenticators(urlparse(settings.base_url).hostname or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
