"""What a wheel holds and needs, and the commands it installs, in an environment and a folder away from the clone."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterable
from email import message_from_string
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from lcm_lightning.config.entry import command
from lcm_lightning.errors import EXTRAS, command_line, explain, missing_package

ROOT = Path(__file__).parent.parent
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files of the package and of `conf/` that git knows."""
    listed = subprocess.check_output(["git", "ls-files", "-z", "--", "conf", "lcm_lightning"], cwd=ROOT, text=True)
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built of the source distribution, which is built of the tracked files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", *tracked):
        copy = folder / "clone" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    python("from setuptools import build_meta; build_meta.build_sdist('..')", folder / "clone")
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    python("from setuptools import build_meta; build_meta.build_wheel('..')", folder / archive.name[: -len(".tar.gz")])
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def python(code: str, cwd: Path) -> None:
    """Run `code` in a process of its own, which must not fail."""
    subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True)


def test_the_wheel_holds_the_package_and_the_configurations_and_nothing_else(
    wheel: zipfile.ZipFile, tracked: list[str]
):
    wanted = {name if name.startswith("lcm_lightning/") else f"lcm_lightning/{name}" for name in tracked}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert wanted - held == set(), "list the new package or files in pyproject.toml, under [tool.setuptools]"
    assert held - wanted == set()


# Modules that are imported once an extra's packages were looked for.
OF_EXTRAS = {"lcm_lightning/app/page.py"}


def normalised(distribution: str) -> str:
    """A distribution's name as package indices compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The top-level names of the packages of others that `nodes` import, without what lies inside them."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names - {*sys.stdlib_module_names, "lcm_lightning"}


def test_every_import_is_of_a_declared_dependency(wheel: zipfile.ZipFile, tracked: list[str]):
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    needed = message_from_string(wheel.read(metadata).decode()).get_all("Requires-Dist")
    names = {line: normalised(re.match(r"[\w.-]+", line)[0]) for line in needed}
    required = {name for line, name in names.items() if "extra ==" not in line}
    optional = {name for line, name in names.items() if "extra ==" in line and '"dev"' not in line}

    modules = {name: ast.parse((ROOT / name).read_text()) for name in tracked if name.endswith(".py")}
    trees = modules.values()
    always = set().union(*(imported(tree.body) for name, tree in modules.items() if name not in OF_EXTRAS))
    texts = "".join((ROOT / name).read_text() for name in tracked if name.endswith(".yaml"))
    built = re.findall(r"_target_: (?!lcm_lightning|null)(\w+)", texts)
    sometimes = set().union(built, *(imported(ast.walk(tree)) for tree in trees))
    distributions = packages_distributions()

    def undeclared(modules: set[str], declared: set[str]) -> set[str]:
        return {name for name in modules if not declared & set(map(normalised, distributions.get(name, [name])))}

    assert undeclared(always, required) == set()
    assert undeclared(sometimes, required | optional) == set()


def test_messages_and_pages_name_declared_extras_and_in_one_way(tracked: list[str]):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        named = normalised(package).partition("-")[0]
        assert any(named in requirement for requirement in extras[extra]), package
    pages = [name for name in tracked if name.endswith((".py", ".yaml"))]
    pages += ["README.md", *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
    texts = {name: (ROOT / name).read_text() for name in pages}
    assert [name for name, text in texts.items() if re.search(r"pip install (-e )?'?\.\[", text)] == []
    named = {extra for text in texts.values() for extra in re.findall(r"'lcm-lightning\[([\w-]+)\]'", text)}
    assert named <= {*extras}


def test_a_package_that_another_library_misses_is_known_by_what_it_says():
    assert missing_package(ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")) == "bitsandbytes"
    assert missing_package(ModuleNotFoundError("Requirement 'mlflow>=1.0.0' not met.")) == "mlflow"
    assert missing_package(ModuleNotFoundError("No module named 'openvino_tokenizers'")) == "openvino_tokenizers"
    missed = ModuleNotFoundError("No module named 'torchvision.datasets'", name="torchvision.datasets")
    assert missing_package(missed) is None


def test_a_plugin_of_hydra_s_that_is_not_installed_is_named_with_its_extra():
    missing = MissingConfigException("not found", "hydra/launcher/submitit_slurm", ["basic"])
    assert explain(missing) == "hydra/launcher=submitit_slurm: is not installed; pip install 'lcm-lightning[sweeps]'"


@pytest.mark.parametrize("interpreter", ["./old", "./nowhere"])
def test_setup_looks_at_the_interpreter_first_and_names_the_remedy(tmp_path: Path, interpreter: str):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "old").write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10); $2"\n')
    (tmp_path / "old").chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={interpreter}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and f"PYTHON={interpreter}: expected Python 3.11 or newer" in done.stderr
    assert "make setup PYTHON=python3.12" in done.stderr and not (tmp_path / ".venv").exists()


FAKE_PYTHON = """#!/bin/sh
case "$*" in
*venv*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo new > .venv/new ;;
*pip*) [ ! -e fail ] || { echo "pip: no network" >&2; exit 1; } ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what `make setup` reads, and an interpreter whose pip fails where a file `fail` lies."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "PYTHON=./python", *arguments]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)


def test_a_set_up_that_did_not_end_says_so_and_is_made_anew(clone: Path):
    (clone / "fail").touch()
    failed = make(clone, "setup")
    assert failed.returncode == 2 and "no network\n.venv: could not be made, as said above" in failed.stderr
    (clone / ".venv" / "half").touch()
    (clone / "fail").unlink()
    assert make(clone, "setup").returncode == 0
    assert sorted(path.name for path in (clone / ".venv").iterdir()) == [".ready", "bin", "new"]


def test_an_environment_of_ones_own_is_not_removed(clone: Path):
    (clone / ".venv").mkdir()
    (clone / ".venv" / "mine").touch()
    (clone / "fail").touch()
    assert make(clone, "setup").returncode == make(clone, "setup").returncode == 2
    (clone / "fail").unlink()
    assert make(clone, "setup").returncode == 0 and (clone / ".venv" / "mine").exists()


@pytest.mark.parametrize("arguments", [[], ["RUN=outputs/nowhere"]])
def test_make_eval_asks_for_a_run_before_it_sets_up(clone: Path, arguments: list[str]):
    done = make(clone, "eval", *arguments)
    assert done.returncode == 2 and "no run folder; give RUN=outputs/<experiment>/<date_time>" in done.stderr
    assert not (clone / ".venv").exists()


def test_the_oldest_python_is_the_same_wherever_it_is_said():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (oldest,) = re.fullmatch(r">=([\d.]+)", project["project"]["requires-python"]).groups()
    assert project["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    for page in ("README.md", "Makefile", "docs/installation.md"):
        assert f"{oldest} or newer" in (ROOT / page).read_text(), page


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[DictConfig, list[str]]]]:
    """What a program composes in an empty folder: for each job the configuration and the providers of its files."""
    monkeypatch.chdir(tmp_path)

    def compose(program: str, *overrides: str) -> list[tuple[DictConfig, list[str]]]:
        jobs = []

        @command(program)
        def main(cfg: DictConfig) -> None:
            jobs.append((cfg, [source.provider for source in HydraConfig.get().runtime.config_sources]))

        monkeypatch.setattr(sys, "argv", [f"{program}.py", *overrides])
        GlobalHydra.instance().clear()
        main()
        GlobalHydra.instance().clear()
        return jobs

    return compose


def own(file: str, text: str) -> None:
    """Write a configuration of one's own under `conf/` of the working folder."""
    path = Path("conf") / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("program", "group", "parent", "key"),
    [
        ("train", "experiment", "quickstart_lora", "name"),
        ("evaluate", "evaluation", "quick", "evaluation.name"),
        ("prepare", "data", "folder", "data.name"),
        ("generate", "model", "tiny", "model.path"),
    ],
)
def test_a_configuration_of_ones_own_is_found_in_the_working_folder(
    composed, program: str, group: str, parent: str, key: str
):
    package = "# @package _global_\n" if group == "experiment" else ""
    own(f"{group}/mine.yaml", f"{package}defaults: [{parent}]\n{key.rpartition('.')[2]}: my own\n")
    ((cfg, providers),) = composed(program, f"{group}=mine")
    assert OmegaConf.select(cfg, key) == "my own"
    assert "working-folder" in providers
    swept = composed(program, "-m", f"{group}={parent},mine")
    assert [OmegaConf.select(cfg, key) == "my own" for cfg, _ in swept] == [False, True]


def test_a_shipped_configuration_wins_over_one_of_the_same_name_in_the_working_folder(composed):
    own("experiment/quickstart_lora.yaml", "# @package _global_\nname: mine\nmax_steps: 1\n")
    own("train.yaml", "name: mine\n")
    ((cfg, _),) = composed("train", "experiment=quickstart_lora")
    assert (cfg.name, cfg.max_steps) == ("quickstart_lora", 400)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("in_clone", [False, True])
def test_without_configurations_of_ones_own_only_those_that_ship_are_searched(composed, monkeypatch, in_clone: bool):
    if in_clone:
        monkeypatch.chdir(ROOT)
    ((_, providers),) = composed("generate", "model=tiny")
    assert providers == ["hydra", "main", "schema"]


def test_hints_name_the_commands_as_they_were_called(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lcm-train"])
    assert [command_line(name) for name in ("evaluate", "generate")] == ["lcm-evaluate", "lcm-generate"]
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert [command_line(name) for name in ("evaluate", "generate")] == [
        "python evaluate.py",
        "python -m lcm_lightning.generate",
    ]


@pytest.fixture(scope="module")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs a program of a fresh environment with the wheel, which finds what the wheel needs in that of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    interpreter = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel.filename)], check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    paths = sysconfig.get_paths()
    (packages / "tests.pth").write_text(f"{paths['purelib']}\n{paths['platlib']}\n")  # their own .pth are not read
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "WANDB_API_KEY")}

    def run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [folder / "bin" / program, *arguments],
            cwd=cwd,
            env={**environment, "HOME": str(cwd), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    origin = run("python", "-c", "import lcm_lightning; print(lcm_lightning.__file__)", cwd=folder)
    assert Path(origin.stdout.strip()).is_relative_to(packages)
    return run


@pytest.mark.slow
def test_the_installed_commands_train_and_draw(installed: Command, tmp_path: Path):
    trained = installed("lcm-train", "experiment=quickstart_lora", "debug=fdr", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    (run,) = (tmp_path / "outputs" / "quickstart_lora").iterdir()
    for left in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt", "lora/pytorch_lora_weights.safetensors"):
        assert (run / left).is_file(), left
    proposed = f"lcm-evaluate run={run.relative_to(tmp_path)} evaluation=quick\n"
    assert proposed in trained.stdout

    drawn = installed("lcm-generate", "model=tiny", "prompt=heart", "steps=2", "num_images=1", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert list((tmp_path / "outputs" / "generate").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("program", ["lcm-evaluate", "lcm-prepare"])
def test_the_other_installed_commands_find_what_ships(installed: Command, tmp_path: Path, program: str):
    shown = installed(program, "data=twemoji", "--cfg", "job", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "name: twemoji\n" in shown.stdout
