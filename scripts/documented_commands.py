"""The commands and the Python that README.md and docs/ show, and what stands for a reader's own folders in them.

What a command needs that a clone without a network and a GPU lacks is told by its own words (`TELLING`), or else by a
comment above its block in the Markdown, which no reader sees: `<!-- needs: hours -->` for all commands of the block,
`<!-- needs: hub 2 4, gpu -->` for its second and fourth, and all.

run_documented_commands.py runs them; tests/test_documented_commands.py composes the configuration of each.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
NEEDS = {
    "hub": "a download from the Hugging Face hub or another server",
    "gpu": "a GPU, or several",
    "cluster": "several machines, or SLURM",
    "hours": "much time or memory",
    "data": "files of the reader's own that nothing here stands for",
    "clone": "to change the Python environment or files of the clone",
    "server": "to run until it is stopped",
}
TELLING = {
    "hub": r"latent-consistency/|clip-benchmark/|SimianLuo/|stabilityai/|https?://|\bnpm\b|git clone"
    r"|wandb:|wandb (?:login|sync|sweep)|wandb_workspace|push_to_hub"
    r"|hparams_search=student|callbacks=(student_quality|early_stopping)(?!.*tiny_clip)",
    "gpu": r"\btrainer=(ddp|fsdp|gpu)\b|adamw8bit|on_gpu",
    "cluster": r"^srun|--nnodes|submitit_slurm",
    "hours": r"make (quickstart|test\S*|coverage|bench|methods-table|pretrain|lint|docs-commands)(?= |$)"
    r"|model\.unet_init|\bmodel=sdxl\b",
    "clone": r"make (setup|docs)(?= |$)|\bpip |-m venv|activate|pre-commit|logger=mlflow"
    r"|pack_\w+\.(py|sh)|build_emoji|benchmarks\.report",
    "server": r"make app(?= |$)|lcm_lightning\.app|wandb agent|mlflow (ui|server)|tensorboard --",
}
SHELLS = ("", "sh", "bash", "shell", "console")
STARTS = re.compile(
    r"(?:\w+=(?:\"[^\"]*\"|\S+) )*"
    r"(?:python3?|torchrun|srun|make|pip|git|npm|tar|wandb|mlflow|tensorboard|\."
    r"|\$\w+|lcm-\w+|\.venv/bin/[\w-]+|[\w/]+\.sh)(?= |$)"
)
ASSIGNMENT = re.compile(r"(\w+)=(\"[^\"]*\"|\S+)")
MARK = re.compile(r"<!--\s*needs:\s*(.*?)\s*-->")

COMPOSES = re.compile(r"@command\(\"(\w+)\"\)|@hydra\.main\([^)]*config_name=\"(\w+)\"")
PART_OF_A_COMMAND = re.compile(r"\.(commands|__main__)$")


def source_files() -> Iterator[tuple[str, Path]]:
    """The modules of the package and of the benchmarks, by the names that `python -m` takes."""
    for file in [*(ROOT / "lcm_lightning").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        yield PART_OF_A_COMMAND.sub("", ".".join(file.relative_to(ROOT).with_suffix("").parts)), file


# Programs with a configuration: the file of conf/ that each composes, and where it does.
SOURCES = {module: file for module, file in source_files() if COMPOSES.search(file.read_text())}
PROGRAMS = {
    module: next(name for name in COMPOSES.search(file.read_text()).groups() if name)  # type: ignore[union-attr]
    for module, file in SOURCES.items()
}
PROGRAMS |= {"train.py": "train", "evaluate.py": "evaluate"}
# The commands of an installed package.
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = {name: PART_OF_A_COMMAND.sub("", place.partition(":")[0]) for name, place in PROJECT["scripts"].items()}

# What pages write for files and folders of their reader's own, and what lies in the working folder in their place.
PLACEHOLDERS = (
    (r"/path/to/[Ff]lickr\w*", "material/photos"),
    (r"/path/to/(?:photos|coco)", "material/folder"),
    (r"\bstyle\.safetensors", "material/runs/finetuned/lora/pytorch_lora_weights.safetensors"),
    (r"/path/to/folder|(?<![\w/-])[\w-]+\.safetensors(?= |$)", "lcm_lightning/assets/tiny"),
    (r"outputs/full_lcm_\w+/(?:<date_time>|\.\.\.)", "material/runs/full_lcm"),
    (r"outputs/(?:lora_\w+|quickstart_lora)(?:/(?:<date_time>|\.\.\.))?(?![\w/])", "material/runs/finetuned"),
    (r"outputs/lcm_flickr30k/\.\.\.", "material/runs/finetuned"),  # beside another: no model is compared with itself
    (r"outputs/<name>/<date_time>", "material/runs"),
    (r"outputs/[\w<>]+/(?:<date_time>|\.\.\.|\d{4}-[\d_-]+)", "material/runs/student"),
    (r"outputs/(?:\.\.\.|a|tcd_noto)(?![\w/])", "material/runs/student"),
    (r"outputs/b(?![\w/])", "material/runs/finetuned"),
    (r"/tmp/lcm_runs/lora\b", "material/runs/finetuned"),
    (r"/tmp/lcm_runs/lcm\b", "material/runs/student"),
    (r"/tmp/flickr8k_shards|\bSHARDS\b", "data/flickr8k"),
    (r"\bphoto\.(?:webp|jpg)", "material/photo.png"),
    (r"path-or-hub-id|(?<==)PATH\b", "material/runs/student"),
    (r"FILE_OR_FOLDER \[--model FOLDER_OR_FILE\]", "material/runs/student"),
    (r"\bOUT\.json\b", "out.json"),
    (r"(?<![\w/])/tmp/", "tmp/"),
)
# What is added to a command to make it small, where it does not say the key itself.
TINY = {
    "train": "model=tiny trainer=cpu logger=csv max_steps=2 val_every=2 data.val_limit=2 data.batch_size=2 "
    "data.num_workers=0 trainer.accumulate_grad_batches=1 trainer.log_every_n_steps=1 callbacks.samples=null",
    "evaluate": "evaluation=quick logger=csv accelerator=cpu evaluation.num_images=4 evaluation.bootstrap_samples=0 "
    "evaluation.lineup.teacher_steps=2 evaluation.lineup.rivals={ddim:[],dpmpp:[]} evaluation.latency_repeats=1 "
    "evaluation.shown=1",
    "generate": "num_images=1 accelerator=cpu",
    "prepare": "prepare.workers=1",
    "export": "overwrite=true",  # another page may have exported the same
}
# What is said otherwise in its place.
SMALLER = (
    (r"^max_steps=.*", "max_steps=2"),
    (r"^val_every=.*", "val_every=2"),
    (r"^data\.batch_size=.*", "data.batch_size=2"),
    (r"^evaluation\.num_images=.*", "evaluation.num_images=4"),
    (r"^evaluation=(?:standard|report|coco30k)$", "evaluation=quick"),
    (r"^model=sd\w+$", "model=tiny"),
    (r"^(models=.*)\bsd15\b", r"\1tiny"),
)


@dataclass(frozen=True)
class Command:
    """A command as a page shows it."""

    page: str  # README.md, docs/drawing.md
    line: int
    text: str  # continued lines joined; without prompt and comment
    needs: tuple[str, ...] = ()
    refused: bool = False  # the page shows the error that it ends with
    variables: Mapping[str, str] = field(default_factory=dict)  # of the shell, set before in the page
    code: str = ""  # of a block of Python, whose first line is `text`

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Configured:
    """A program with a configuration, as it is typed."""

    config: str  # file of conf/
    start: tuple[str, ...]  # what is typed before the arguments
    arguments: tuple[str, ...]


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md, and all of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def documented_commands(page: Path) -> list[Command]:
    """The shell commands in the code blocks of a page, and its blocks of Python, in its order."""
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    variables: dict[str, str] = {}
    found: list[Command] = []
    mark = ""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "inline":
            variables |= variables_in_prose(token)
        if token.type in ("code_block", "fence") and token.info in SHELLS:
            found += commands_of_block(token, name, needs_of_mark(mark), variables)
        elif token.type == "fence" and token.info == "python":
            text = token.content.splitlines()[0]
            found.append(Command(name, (token.map or [0])[0] + 2, text, tuple(needs_of_mark(mark)), code=token.content))
        comment = MARK.search(token.content) if token.type == "html_block" else None
        mark = comment[1] if comment else ""
    return found


def variables_in_prose(token: Token) -> dict[str, str]:
    """Shell variables that inline code such as `C="debug=fdr"` sets for the blocks after it."""
    spans = [child.content for child in token.children or () if child.type == "code_inline"]
    assigned = [match for span in spans if (match := ASSIGNMENT.fullmatch(span)) and match[1].isupper()]
    return {match[1]: match[2].strip('"') for match in assigned}


def commands_of_block(
    token: Token, page: str, marked: Mapping[str, set[int]], variables: dict[str, str]
) -> Iterator[Command]:
    """The commands of a code block; its assignments are added to `variables`. What commands print is passed over."""
    lines = logical_lines(token)
    prompted = any(text.startswith("$ ") for _, text in lines)
    number = 0
    for (line, text), (_, following) in zip(lines, [*lines[1:], (0, "")], strict=True):
        typed = text.removeprefix("$ ")
        if prompted and typed == text:
            continue
        if assigned := ASSIGNMENT.fullmatch(typed):
            variables[assigned[1]] = assigned[2].strip('"')
        elif STARTS.match(typed):
            number += 1
            bare = without_comment(typed)
            told = {need for need, telling in TELLING.items() if re.search(telling, expanded(bare, variables))}
            needs = told | {need for need, numbers in marked.items() if not numbers or number in numbers}
            yield Command(page, line, bare, tuple(sorted(needs)), following.startswith("error:"), dict(variables))


def needs_of_mark(mark: str) -> dict[str, set[int]]:
    """What a mark such as `hub 2 4, gpu` says: each need with the numbers of the commands, none for all."""
    parts = [part.split() for part in mark.split(",") if part.strip()]
    return {words[0]: {int(number) for number in words[1:]} for words in parts}


def logical_lines(token: Token) -> list[tuple[int, str]]:
    """The lines of a code block with their numbers in the page, continued ones joined as a shell joins them."""
    first = (token.map or [0])[0] + (2 if token.type == "fence" else 1)
    lines, joined, start = [], "", first
    for number, line in enumerate(token.content.splitlines(), first):
        start = start if joined else number
        joined += re.sub(r"^ +", " ", line.removesuffix("\\")) if joined else line.removesuffix("\\")
        if not line.endswith("\\"):
            lines.append((start, joined.strip()))
            joined = ""
    return lines


def without_comment(text: str) -> str:
    """A command without the comment behind it."""
    quote = ""
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign == "#" and text[place - 1 : place] in (" ", ""):
            return text[:place].rstrip()
    return text


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """A command with the variables that its page has set; others stay as they are."""
    return re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), text)


def programs(command: Command) -> list[list[str]]:
    """The words of each program that a command starts, with variables and placeholders replaced."""
    text = command.code or expanded(command.text, command.variables)
    for pattern, replacement in PLACEHOLDERS:
        text = re.sub(pattern, replacement, text)
    if command.code:
        return [["python", "-c", text]]
    started: list[list[str]] = [[]]
    for word in shlex.split(text):
        if word == "&&":
            started.append([])
        else:
            started[-1].append(word)
    return started


def configured(program: Sequence[str]) -> Configured | None:
    """A program's configuration and arguments; None if it has none."""
    words = list(program)
    before = 0
    while before < len(words) and (ASSIGNMENT.fullmatch(words[before]) or words[before] == "srun"):
        before += 1
    name = words[before] if before < len(words) else ""
    if name == "make" and "eval" in words:
        given = dict(word.split("=", 1) for word in words if "=" in word)
        asked = (f"run={given['RUN']}", *shlex.split(given.get("ARGS", "")))
        return Configured("evaluate", ("python", "evaluate.py"), asked)
    if name in SCRIPTS:
        place, module = before, SCRIPTS[name]
    elif name == "torchrun":
        place = next(place for place, word in enumerate(words) if word.endswith(".py"))
        module = words[place]
    elif Path(name).name in ("python", "python3"):
        place = before + (2 if words[before + 1] == "-m" else 1)
        module = words[place]
    else:
        return None
    if module == "benchmarks.child" and words[place + 2 : place + 3] == ["train"]:
        place, module = place + 2, "train.py"
    if module not in PROGRAMS:
        return None
    return Configured(PROGRAMS[module], tuple(words[: place + 1]), tuple(words[place + 1 :]))


def shrunk(found: Configured) -> list[str]:
    """A program with a configuration, with what makes it small."""
    arguments = list(found.arguments)
    for pattern, replacement in SMALLER:
        arguments = [re.sub(pattern, replacement, argument) for argument in arguments]
    typed = {argument.partition("=")[0] for argument in arguments}
    added = [word for word in TINY.get(found.config, "").split() if word.partition("=")[0] not in typed]
    # Hydra takes settings from one place of the command alone: before `--cfg job`, after `--help`.
    end = next((place for place, word in enumerate(arguments) if place and word.startswith("--")), len(arguments))
    return [*found.start, *arguments[:end], *added, *arguments[end:]]
