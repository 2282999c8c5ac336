"""Reading a run's folder back."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lcm_lightning.methods import adapter_kinds
from lcm_lightning.models.adapters import LoraSettings, active_adapters, add_lora, lora_parameters, lora_state_dict
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.lora_files import LORA_FILE, save_lora
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.runs.contents import Adapter, write_manifest
from lcm_lightning.runs.loading import load_run


def run_folder(folder: Path, pipeline: Path, *adapters: tuple[str, str, str]) -> Path:
    """A run that left (name, file, layers) `adapters` with random weights."""
    for name, file, layers in adapters:
        model = load_stable_diffusion(str(pipeline))
        add_lora(model.unet, name, LoraSettings(4, 4, layers))
        for parameter in lora_parameters(model.unet, name):
            torch.nn.init.normal_(parameter, std=0.1)
        save_lora(lora_state_dict(model.unet, name), folder / "lora" / file)
    write_manifest(folder / "lora", [Adapter(adapter_kinds()[name], file) for name, file, _ in adapters])
    target = "lcm_lightning.models.stable_diffusion.load_stable_diffusion"
    OmegaConf.save({"model": {"_target_": target, "path": str(pipeline)}}, folder / "config.yaml")
    return folder


def output(model: StableDiffusion) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        return model.denoise(x_t, torch.tensor([500]), Condition(text))


def test_all_adapters_of_a_run_act_and_none_trains(pipeline_folder: Path, tmp_path: Path):
    adapters = (("finetuned", "teacher.safetensors", "attention"), ("lcm", LORA_FILE, "lcm_lora"))
    loaded = load_run(run_folder(tmp_path, pipeline_folder, *adapters))
    as_loaded = output(loaded.model)
    with active_adapters(loaded.model, ("finetuned", "lcm")):
        torch.testing.assert_close(as_loaded, output(loaded.model), rtol=0, atol=0)
    for one in ((), ("finetuned",), ("lcm",)):
        with active_adapters(loaded.model, one):
            assert (output(loaded.model) - as_loaded).abs().max() > 1e-3
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_lora_file_can_be_read_by_whoever_can_read_its_neighbours(tmp_path: Path):
    (tmp_path / "neighbour").write_text("")
    save_lora({"unet.a.lora_A.weight": torch.ones(2, 2)}, tmp_path / LORA_FILE)
    assert (tmp_path / LORA_FILE).stat().st_mode == (tmp_path / "neighbour").stat().st_mode
    assert load_file(tmp_path / LORA_FILE)["unet.a.lora_A.weight"].sum() == 4
