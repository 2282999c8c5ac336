"""Two network namespaces, joined by one cable, as two machines: torchrun on each, as docs/scaling.md says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import ROOT, SMALL

NODES = {"lcm-node0": "10.213.77.1", "lcm-node1": "10.213.77.2"}
COMMON = (
    *SMALL,
    "experiment=lcm_flickr8k",
    "trainer=ddp_sim",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "logger=csv",
    "callbacks.samples=null",
    "max_steps=4",
    "val_every=4",
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[None]:
    """The two namespaces of `NODES`, each with its end of a virtual cable and nothing else."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("making network namespaces takes iproute2 and root")
    try:
        for name in NODES:
            ip("netns", "add", name)
        ip("link", "add", "lcm-cable0", "type", "veth", "peer", "name", "lcm-cable1")
        for number, (name, address) in enumerate(NODES.items()):
            ip("link", "set", f"lcm-cable{number}", "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"lcm-cable{number}")
            for device in ("lo", f"lcm-cable{number}"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        remove_nodes()
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield
    remove_nodes()


def remove_nodes() -> None:
    for name in NODES:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_nodes_train_what_two_processes_of_one_do(
    nodes: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pipeline_folder: Path,
    flickr_shards: Path,
    train_command: Callable[..., subprocess.CompletedProcess[str]],
):
    monkeypatch.chdir(tmp_path)
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}")
    one = train_command(*places, *COMMON, "hydra.run.dir=one")
    assert one.returncode == 0, one.stderr
    processes = []
    for rank, name in enumerate(NODES):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}"]
        launcher += ["--nproc_per_node=1", f"--master_addr={NODES['lcm-node0']}", "--master_port=29500"]
        command = ["ip", "netns", "exec", name, *launcher, str(ROOT / "train.py"), *places, *COMMON]
        command += ["trainer.num_nodes=2", "trainer.devices=1", "hydra.run.dir=two"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"lcm-cable{rank}"}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    one, two = (load_file(Path(run, "lora", "pytorch_lora_weights.safetensors")) for run in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
