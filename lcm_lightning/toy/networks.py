"""Architectures of the embedded pipeline: Stable Diffusion's classes, small enough to train on two CPU cores.

Channels are powers of two and attention stays off the largest map: what CPUs compute fastest. Images are 64 px, latents
16 x 16 x 4.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from lcm_lightning.models.stable_diffusion import StableDiffusion

RESOLUTION = 64
TEXT_LENGTH = 24
TEXT_WIDTH = 256
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# How CLIP cuts text before byte-pair encoding (Radford et al. 2021): words, single digits, runs of signs.
CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

# Stable Diffusion's form of schedule (Rombach et al. 2022) with more noise at its end, and the velocity as target. An
# error of an epsilon prediction is multiplied by sqrt(1/a_t - 1), up to 64 here, on its way to x_0; that of a
# velocity by at most 1. With Stable Diffusion's own beta_end of 0.012 a 16 x 16 map shows its layout through the
# noise of the last timestep: 7 % of a shape's amplitude, averaged over 256 places, is as strong as the noise. A
# network then reads layouts there, where a drawing starts from noise that holds none, instead of from the text (Lin
# et al. 2024, arXiv 2305.08891).
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def tiny_vae() -> AutoencoderKL:
    """Autoencoder of 0.65 million weights: 64 x 64 x 3 to 16 x 16 x 4, without attention."""
    return AutoencoderKL(
        sample_size=RESOLUTION,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def tiny_unet() -> UNet2DConditionModel:
    """UNet of 15 million weights on 16 x 16 x 4 latents, attending to the text at 8 x 8 and 2 x 2.

    The text also enters every block beside the timestep, as a scale and shift of its channels. On the 2 x 2 map a
    padded 3 x 3 convolution has weights of its own for each place: that is where a vector of text becomes a layout,
    which attention, adding nearly the same at all places of a noisy map, cannot learn in few steps.
    """
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(64, 128, 192, 224),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(1, 2, 3, 7),  # diffusers' name for the number of heads
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def tiny_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """CLIP of 4 million weights: 3 layers over `TEXT_LENGTH` tokens, 4 layers over 8 x 8 patches of 8 px."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": RESOLUTION,
        "patch_size": 8,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256))


def train_tokenizer(captions: Iterable[str], vocab_size: int = 2048) -> CLIPTokenizer:
    """A `CLIPTokenizer` whose byte-pair merges (Sennrich et al. 2016) are learnt from `captions`."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # As in CLIP's vocabulary every byte has a form that ends a word, so that nothing is unknown. They are given in
    # order, since the trainer numbers those it finds itself at random.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=alphabet + [sign + WORD_END for sign in alphabet],
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = (Path(path) for path in bpe.model.save(folder))
        return _clip_tokenizer(vocabulary, merges)


def _clip_tokenizer(vocabulary: Path, merges: Path) -> CLIPTokenizer:
    tokens = json.loads(vocabulary.read_text())
    for token in (BEGIN, END):
        tokens[token] = len(tokens)
    vocabulary.write_text(json.dumps(tokens, ensure_ascii=False))
    return CLIPTokenizer.from_pretrained(vocabulary.parent, model_max_length=TEXT_LENGTH)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Give latents of per-channel `mean` and `std` [C] mean 0 and variance 1, reconstructions staying what they are.

    The map ``z -> (z - mean) / std`` goes into the 1 x 1 convolution before the latents, its inverse into the one
    after. `scaling_factor` stays 1, and readers of pipelines that know no shift get it right too.
    """
    channels = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.bias[:channels] -= mean
    before.bias[:channels] /= std
    before.weight[:channels] /= std.reshape(-1, 1, 1, 1)
    before.bias[channels:] -= 2 * std.log()  # the posterior's log-variances
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.reshape(1, -1, 1, 1)


def save_pipeline(model: StableDiffusion, folder: Path) -> None:
    """Write `model` as the folder of its diffusers pipeline, in half precision."""
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    pipeline = getattr(diffusers, model.pipeline)(**model.pipeline_parts(), scheduler=scheduler)
    copy.deepcopy(pipeline).to(torch.float16).save_pretrained(folder)
    tidy_configs(folder)


def tidy_configs(folder: Path) -> None:
    """Let transformers load half-precision weights in single precision, as diffusers does; drop their origin."""
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
            if "dtype" in part:
                part["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")
