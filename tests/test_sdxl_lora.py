"""LoRA files of SDXL: read by diffusers as they were trained, and read here as diffusers reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.adapters import randomise
from lcm_lightning.methods.lcm_lora import LCM
from lcm_lightning.models.adapters import (
    LoraSettings,
    add_lora,
    fuse_lora,
    kohya_state_dict,
    load_lora,
    lora_state_dict,
    set_active_adapters,
)
from lcm_lightning.models.architectures import SDXL_UNET
from lcm_lightning.models.identity import encoder_key
from lcm_lightning.models.kinds import KOHYA_FILE, LORA_FILE
from lcm_lightning.models.lora_files import adaptable_layers, kohya_name, match_layers, read_lora, save_lora
from lcm_lightning.models.sampling import sample
from lcm_lightning.models.stable_diffusion import StableDiffusionXL, load_stable_diffusion

# By kohya's sd-scripts, whose UNet of SDXL has the names of Stability's generative-models.
KOHYA_NAMES = {
    "conv_in": "input_blocks_0_0",
    "down_blocks.0.resnets.1.conv2": "input_blocks_2_0_out_layers_3",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj": (
        "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj"
    ),
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.attentions.2.transformer_blocks.3.attn2.to_out.0": (
        "output_blocks_2_1_transformer_blocks_3_attn2_to_out_0"
    ),
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.2.resnets.0.conv1": "output_blocks_6_0_in_layers_2",
    "add_embedding.linear_2": "label_emb_0_2",
    "conv_out": "out_2",
}


@pytest.fixture
def sdxl(sdxl_folder: Path) -> StableDiffusionXL:
    model = load_stable_diffusion(str(sdxl_folder))
    assert isinstance(model, StableDiffusionXL)
    return model


@pytest.fixture(scope="module")
def architecture() -> UNet2DConditionModel:
    """SDXL's UNet without memory behind its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL_UNET)


def test_layers_have_the_names_of_kohya_s_scripts(architecture: UNet2DConditionModel):
    layers = {name for name, _ in adaptable_layers(architecture)}
    assert layers >= KOHYA_NAMES.keys()
    found = {name: kohya_name(name, architecture.config).replace(".", "_") for name in KOHYA_NAMES}
    assert found == KOHYA_NAMES


def test_every_layer_of_the_whole_architecture_is_found_again(architecture: UNet2DConditionModel, tmp_path: Path):
    """By this reader and by diffusers'."""
    layers = [name for name, _ in adaptable_layers(architecture)]
    kohya = kohya_state_dict(zeros(layers), architecture)
    assert len(kohya) == 3 * len(layers)
    save_file(kohya, tmp_path / "all.safetensors")
    updates, unused = match_layers(read_lora(tmp_path / "all.safetensors", "all"), {"unet": architecture}, "all")
    assert not unused and updates["unet"].keys() == set(layers)

    chosen = LoraSettings(target_modules="lcm_lora").layer_names(architecture)
    trained = [name for name in layers if any(name == end or name.endswith(f".{end}") for end in chosen)]
    mapped = _maybe_map_sgm_blocks_to_diffusers(kohya_state_dict(zeros(trained), architecture), architecture.config)
    converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)

    def plain(key: str) -> str:
        key = key.replace(".processor.", ".").replace("_lora.", ".lora.").replace("to_out.lora", "to_out.0.lora")
        return key.removeprefix("unet.").partition(".lora.")[0]

    assert {plain(key) for key in converted} == set(trained)


def zeros(layers: list[str]) -> dict[str, Tensor]:
    return {f"unet.{name}.lora_{side}.weight": torch.zeros(1, 1) for name in layers for side in "AB"}


@pytest.mark.parametrize("file", [LORA_FILE, KOHYA_FILE])
def test_diffusers_reads_what_is_exported(sdxl: StableDiffusionXL, sdxl_folder: Path, tmp_path: Path, file: str):
    add_lora(sdxl.unet, "lcm", LoraSettings(rank=4, alpha=6))
    randomise(sdxl, seed=7)
    tensors = lora_state_dict(sdxl.unet, "lcm")
    save_lora(tensors if file == LORA_FILE else kohya_state_dict(tensors, sdxl.unet), tmp_path / file)
    pipeline = diffusers_pipeline(sdxl_folder)
    before = theirs(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name=file)
    torch.testing.assert_close(ours(sdxl), theirs(pipeline), atol=1e-4, rtol=0)
    assert (theirs(pipeline) - before).abs().max() > 1e-2


def kohya_file(sdxl: StableDiffusionXL, folder: Path) -> Path:
    """A LoRA as kohya's scripts train it on the UNet and both text encoders.

    Not on their attention, which diffusers 0.42 passes over under transformers 5.
    """
    generator = torch.Generator().manual_seed(3)
    layers = {
        "lora_unet_input_blocks_3_0_in_layers_2": sdxl.unet.down_blocks[1].resnets[0].conv1,
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k": (
            sdxl.unet.down_blocks[1].attentions[0].transformer_blocks[1].attn2.to_k
        ),
        "lora_unet_output_blocks_1_2_conv": sdxl.unet.up_blocks[0].upsamplers[0].conv,
    }
    for number, encoder in enumerate(sdxl.text_encoders.values(), 1):
        for name, layer in encoder.named_modules():
            if name.endswith(("mlp.fc1", "mlp.fc2")):
                full = f"text_model.{name.removeprefix('text_model.')}"
                layers[f"lora_te{number}_{full.replace('.', '_')}"] = layer
    tensors = {}
    for name, layer in layers.items():
        shape = layer.weight.shape
        tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(4, *shape[1:], generator=generator)
        up = 0.3 * torch.randn(shape[0], 4, *(1 for _ in shape[2:]), generator=generator)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, folder / "style.safetensors")
    return folder / "style.safetensors"


@pytest.mark.parametrize("fused", [False, True])
def test_a_file_on_both_text_encoders_draws_as_in_diffusers(
    sdxl: StableDiffusionXL, sdxl_folder: Path, tmp_path: Path, fused: bool
):
    file, before = kohya_file(sdxl, tmp_path), ours(sdxl)
    pipeline = diffusers_pipeline(sdxl_folder)
    pipeline.load_lora_weights(file)
    model = load_stable_diffusion(str(sdxl_folder), defer_encoders=True)
    if fused:
        fuse_lora(model, file)
    else:
        load_lora(model, file, "style")
        set_active_adapters(model, ["style"])
    torch.testing.assert_close(ours(model), theirs(pipeline), atol=1e-4, rtol=0)
    assert (ours(model) - before).abs().max() > 1e-2


def test_each_text_encoder_gets_its_own_update(sdxl: StableDiffusionXL, tmp_path: Path):
    generator = torch.Generator().manual_seed(3)
    layers = [encoder.get_submodule(name) for encoder, name in attention(sdxl)]
    tensors, expected = {}, []
    for number, layer in enumerate(layers, 1):
        width = layer.in_features
        down, up = torch.randn(4, width, generator=generator), torch.randn(width, 4, generator=generator)
        name = f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
        expected.append(layer.weight + 2 / 4 * up @ down)
    save_file(tensors, tmp_path / "style.safetensors")
    fuse_lora(sdxl, tmp_path / "style.safetensors")
    for (encoder, name), weight in zip(attention(sdxl), expected, strict=True):
        torch.testing.assert_close(encoder.get_submodule(name).weight, weight)


def attention(model: StableDiffusionXL) -> list[tuple[nn.Module, str]]:
    """Both text encoders and the name of one of their layers."""
    return [
        (encoder, next(name for name, _ in encoder.named_modules() if name.endswith("layers.0.self_attn.q_proj")))
        for encoder in model.text_encoders.values()
    ]


def test_a_cache_knows_a_lora_on_the_second_text_encoder_alone(sdxl: StableDiffusionXL, tmp_path: Path):
    name = "lora_te{}_text_model_encoder_layers_0_self_attn_q_proj"
    keys = [encoder_key(sdxl)["text_encoder"]]
    for number in (1, 2):
        file = tmp_path / f"te{number}.safetensors"
        tensors = {f"{name.format(number)}.lora_{side}.weight": torch.ones(4, 4) for side in ("down", "up")}
        save_file(tensors, file)
        keys.append(encoder_key(sdxl, str(file))["text_encoder"])
    assert len(set(keys)) == 3


def diffusers_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SHAPE = {"height": 32, "width": 32, "output_type": "pt"}


def theirs(pipeline: StableDiffusionXLPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipeline("a dog", num_inference_steps=4, guidance_scale=1.0, generator=generator, **SHAPE).images


def ours(model: StableDiffusionXL) -> Tensor:
    return sample(model, ["a dog"], seeds=[3], steps=4, guidance_scale=1.0, sampler=LCM, resolution=32)
