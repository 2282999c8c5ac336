"""Errors a user can act on, and how entry points show them."""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

P = ParamSpec("P")
R = TypeVar("R")


def program() -> str:
    """How this program was started: `python train.py`, `python -m lcm_lightning.generate` or `lcm-train`."""
    path = Path(sys.argv[0])
    if path.stem == "__main__":
        path = path.parent
    if path.parent.name == "lcm_lightning":
        return f"python -m lcm_lightning.{path.stem}"
    return path.name if path.name.startswith("lcm-") else f"python {path.name}"


def command_line(name: str) -> str:
    """How to start the program `name`, in the way this one was: `lcm-train`, or `python train.py`."""
    if program().startswith("lcm-"):
        return f"lcm-{name}"
    return f"python {name}.py" if name in ("train", "evaluate") else f"python -m lcm_lightning.{name}"


SUGGESTED = 3  # places that a name may be meant to stand at
# Extras by what they install that not everybody needs: packages as they are imported, and plugins as Hydra calls them.
EXTRAS = {
    "bitsandbytes": "eightbit",
    "datasets": "hub-datasets",
    "gradio": "app",
    "mlflow": "mlflow",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "openvino_tokenizers": "openvino",
    "optuna": "sweeps",
    "submitit_local": "sweeps",
    "submitit_slurm": "sweeps",
    "tensorboard": "tensorboard",
    "torch_fidelity": "inception",
}
SHOW_KEYS = f"{program()} --cfg job"


class UserError(Exception):
    """A mistake in a command, a configuration or an input file.

    The message names the key, the value found, what was expected and the command or setting that fixes it.
    Entry points print it without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """The start of another library's message, for quoting in one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def short(text: object, limit: int = 60) -> str:
    """A long path or key without its middle, so that a message stays one that is read."""
    whole, start = str(text), limit // 4
    return whole if len(whole) <= limit else f"{whole[:start]}...{whole[start + 3 - limit :]}"


def shown(value: object) -> str:
    """A value as it is typed: null, true and false where Python says None, True and False."""
    words: dict[object, str] = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def install(package: str) -> str:
    """The command that installs one of the packages of `EXTRAS`."""
    return f"pip install 'lcm-lightning[{EXTRAS[package]}]'"


def missing_package(error: ImportError) -> str | None:
    """The package of `EXTRAS` that an import, or another library's check, has missed; None if it is another one."""
    said = str(error) if error.name is None else error.name.partition(".")[0]
    return next((package for package in EXTRAS if re.search(rf"\b{package}\b", said)), None)


def closest(word: str, names: Collection[str], prefix: str = "") -> str:
    """The question whether the one of `names` that is most like `word` was meant, for the midst of a message, or ""."""
    close = get_close_matches(word, names, n=1)
    return f"did you mean {prefix}{close[0]}? " if close else ""


def no_such_file(group: str, option: str, names: Collection[str]) -> str:
    """That a config group has no file called `option`, and which of `names` may be meant."""
    meant = closest(option.lower(), names, f"{group}=")
    return f"{group}={option}: there is no such file in conf/{group}; {meant}there are {', '.join(names)}"


def innermost(error: BaseException) -> BaseException:
    """What `error` was raised from, and that from, to the first or to a `UserError`: Hydra wraps an error by levels."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def report_user_errors(entry_point: Callable[P, R]) -> Callable[P, R]:
    """Decorate an entry point so that a `UserError` ends it with one message on stderr and status 2; Ctrl-C with 130.

    Goes under `@hydra.main`: Hydra would otherwise print the traceback of its own machinery. A run folder that holds
    nothing yet is removed.
    """

    @functools.wraps(entry_point)
    def run_task(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return entry_point(*args, **kwargs)
        except UserError as error:
            with suppress(OSError):  # a disk that refuses to write may refuse that too
                remove_unused_run_folder()
            fail(str(error))
        except KeyboardInterrupt:
            with suppress(OSError):
                remove_unused_run_folder()
            print("\ninterrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    return run_task


def report_configuration_errors(entry_point: Callable[P, R]) -> Callable[P, R]:
    """Decorate an entry point so that what Hydra cannot compose ends it as a `UserError` does.

    Goes over `@hydra.main`, which prints some such errors in several lines that end with advice to look at its
    traceback, and others as a traceback.
    """

    @functools.wraps(entry_point)
    def run_hydra(*args: P.args, **kwargs: P.kwargs) -> R:
        before = os.environ.get("HYDRA_FULL_ERROR")
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises then what it would print
        try:
            return entry_point(*args, **kwargs)
        except UserError as error:
            fail(str(error))
        except (HydraException, OmegaConfBaseException, OSError) as error:
            if any(frame.name == "run_task" for frame in traceback.extract_tb(error.__traceback__)):
                raise
            fail(explain(error))
        finally:
            os.environ.pop("HYDRA_FULL_ERROR")
            if before is not None:
                os.environ["HYDRA_FULL_ERROR"] = before

    return run_hydra


def explain(error: Exception) -> str:
    """What was wrong with the command line that Hydra could not compose, with its remedy."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group.startswith("hydra/") and option in EXTRAS:
            return f"{group}={option}: is not installed; {install(option)}"
        return no_such_file(group, option, error.options)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {unreadable(error.override, sys.argv[1:])}"
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return f"hydra.run.dir: the run folder cannot be made ({error}); set hydra.run.dir=... to a place with room"
    message = first_line(error)
    if message.startswith(of_resolver := "UserError raised while resolving interpolation: "):  # without a cause
        return message.removeprefix(of_resolver)
    if message.startswith(ambiguous := "Ambiguous value for argument "):
        override = message.removeprefix(ambiguous)[1:-1]
        return f"{override}: quote a text with commas twice: {quoted(override)}; a list takes [], and a sweep -m"
    advice = f"{message.removesuffix('.')}; `{SHOW_KEYS}` shows all keys"
    for override in sys.argv[1:]:
        key = override.lstrip("+~").partition("=")[0]
        if f"'{key}'" in message or key == getattr(error, "full_key", None):
            return f"{override}: {no_such_key(error, override) or advice}"
    return advice


def unreadable(override: str, arguments: Sequence[str]) -> str:
    """Why Hydra's grammar does not take one of the command line's arguments, with its remedy."""
    key, equals, value = override.partition("=")
    if not equals:
        return no_assignment(override, arguments)
    if placeholder := re.search(r"<[\w -]+>", value):
        return f"{placeholder[0]} stands for a name that you know; put that in its place"
    if (sign := unclosed(value)) is not None:
        return (
            f"{sign} is never closed; close it, or, if it belongs to a text, quote the value twice: {quoted(override)}"
        )
    if value.startswith("["):
        example = f'{key}=["...","..."]'
        return f"is no list that can be read; quote the texts in it: {shlex.quote(example)}"
    return f"holds signs that mean more than themselves; quote the value twice: {quoted(override)}"


def unclosed(value: str) -> str | None:
    """The last bracket that is opened and never closed outside quotes; None where there is none."""
    opened = []
    for sign in re.sub(r"\"[^\"]*\"|'[^']*'", "", value):
        if sign in "[{(":
            opened.append(sign)
        elif sign in "]})" and opened:
            opened.pop()
    return opened[-1] if opened else None


def no_assignment(word: str, arguments: Sequence[str]) -> str:
    """What is wrong with a word without ``=``; mostly the shell has cut a text at its spaces."""
    place = arguments.index(word) if word in arguments else 0
    if [*arguments[place + 1 :], ""][0].startswith("="):
        return f"expected {word}=..., without spaces around the ="
    starts = [n for n, argument in enumerate(arguments[:place]) if "=" in argument and not argument.startswith("-")]
    if not starts:
        return f"expected key=value, such as seed=1; `{program()} --help` lists the keys"
    words = takewhile(lambda argument: "=" not in argument, arguments[starts[-1] + 1 :])
    text = " ".join([arguments[starts[-1]], *words])
    return f"expected key=value; if it belongs to the text before it, quote that twice: {quoted(text)}"


def quoted(override: str) -> str:
    """An override whose value is one text, quoted for Hydra and then for the shell: ``'key="a, b"'``."""
    key, _, value = override.partition("=")
    escaped = value.replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


def no_such_key(error: Exception, override: str) -> str | None:
    """What the key may have been meant to be, where Hydra was asked to set one that is not there; else None."""
    name, section = getattr(error.__cause__, "key", None), getattr(error.__cause__, "parent_node", None)
    known = [str(key) for key in section if not str(key).startswith("_")] if isinstance(section, DictConfig) else []
    if not known:
        return None
    key = override.partition("=")[0]
    adding = f"; +{override} would add it" if key.endswith(f".{name}") else ""
    if "hydra" in known:  # the top; a choice of experiment leaves no key
        known[known.index("hydra")] = "experiment"
        name = key
    assert isinstance(section, DictConfig), "it has keys"
    return f"there is no such key; {suggestion(str(name), known, section._get_root())}{adding}"


def suggestion(name: str, known: Collection[str], config: object) -> str:
    """What a name may have been meant to be.

    Args:
        name: may be dotted.
        known: names where it was looked for.
        config: the whole configuration, in whose sections it may stand.
    """
    elsewhere: dict[str, list[str]] = {}
    keys = [*keys_below(OmegaConf.to_container(config) if isinstance(config, DictConfig) else config)]
    for key in keys:
        if key != name:
            elsewhere.setdefault(key.rpartition(".")[2], []).append(key)
    close = [key for key in keys if key.endswith(f".{name}")] or get_close_matches(name.partition(".")[0], known, n=1)
    close = close or [key for leaf in get_close_matches(name, elsewhere, n=1) for key in elsewhere[leaf]]
    if not close:
        return f"there are {', '.join(known)}"
    return f"did you mean {' or '.join(close[:SUGGESTED])}? `{SHOW_KEYS}` shows all"


def keys_below(section: object, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the values in a configuration's sections, without Hydra's own and instructions."""
    for name, value in section.items() if isinstance(section, dict) else ():
        if not str(name).startswith("_") and prefix + str(name) != "hydra":
            yield from keys_below(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]


def remove_unused_run_folder() -> None:
    """Remove the folder Hydra made for a run if it holds only what Hydra wrote there."""
    if not HydraConfig.initialized() or (notes_folder := HydraConfig.get().output_subdir) is None:
        return
    if OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir"):  # of a sweep as a whole, which is no run
        return
    folder = Path(HydraConfig.get().runtime.output_dir)
    notes = folder / notes_folder
    log = folder / f"{HydraConfig.get().job.name}.log"
    if not folder.is_dir() or not set(folder.iterdir()) <= {notes, log}:
        return
    for file in (*notes.glob("*.yaml"), log):
        file.unlink(missing_ok=True)
    here = Path.cwd()
    for empty in (notes, folder, *(parent for parent in folder.parents if here in parent.parents)):
        if any(empty.iterdir()):
            return
        empty.rmdir()


def fail(message: str) -> NoReturn:
    """End the program with one message and status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
