"""The recipe of the embedded pipeline: autoencoder, CLIP and UNet each learn a handful of pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from lightning.pytorch.callbacks import EMAWeightAveraging
from transformers import CLIPModel

from lcm_lightning.config.resolvers import package_file
from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.toy.networks import normalise_latents, tiny_vae, train_tokenizer
from lcm_lightning.toy.pretraining import (
    ClipPretraining,
    Pretraining,
    UnetPretraining,
    VaePretraining,
    matching_loss,
    psnr,
    shift_and_scale,
    trapezoid,
)

NOTO = package_file("assets/data/noto_emoji")


def overfit(module: Pretraining, steps: int, *callbacks: L.Callback) -> list[float]:
    """Losses of `steps` steps on the same 8 pictures."""
    losses: list[float] = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append(outputs["loss"].item())

    data = CaptionedImages("few", NOTO, resolution=64, batch_size=8, num_workers=0, val_limit=8)
    data.train_dataloader = data.val_dataloader
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record(), *callbacks],
    )
    trainer.fit(module, datamodule=data)
    return losses


def settings(folder: Path, lr: float) -> dict[str, object]:
    """What every training takes."""
    return {
        "optimizer": partial(torch.optim.AdamW, lr=lr),
        "warmup_steps": 2,
        "decay_steps": 5,
        "folder": str(folder),
    }


def test_learning_rate_rises_stays_and_falls_to_zero():
    factors = [trapezoid(step, warmup=4, decay=5, total=20) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(factors[4:16]) == {1.0}
    assert factors[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 4, 4)
    assert psnr(images + 0.2, images).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)


def test_two_styles_of_one_emoji_both_match_its_caption():
    matches = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    right = torch.log(matches / matches.sum(1, keepdim=True) + 1e-9)
    entropy = 2 / 3 * torch.log(torch.tensor(2.0))
    assert torch.isclose(matching_loss(right, matches), entropy, atol=1e-4)
    assert matching_loss(torch.zeros(3, 3), matches) > entropy


def test_moved_pictures_keep_their_white_ground():
    images = torch.ones(4, 3, 64, 64)
    images[:, :, 24:40, 24:40] = -1
    moved = shift_and_scale(images, SampleRandomness(torch.arange(4), torch.device("cpu")))
    assert torch.all(moved[:, :, [0, -1]] == 1)
    assert not torch.equal(moved[0], moved[1])
    dark = (moved < 0).float().sum((1, 2, 3)) / 3
    assert torch.all((dark > 0.5 * 256) & (dark < 1.3 * 256))


def test_normalised_latents_decode_to_the_same_image():
    torch.manual_seed(0)
    vae, images = tiny_vae(), torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = torch.tensor([0.1, -0.5, 1.0, 2.0]), torch.tensor([0.5, 2.0, 1.0, 3.0])
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        reconstructed = vae.decode(before.mean).sample
        normalise_latents(vae, mean, std)
        after = vae.encode(images).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, reconstructed, atol=1e-4, rtol=1e-4)
    shape = (1, 4, 1, 1)
    torch.testing.assert_close(after.mean, (before.mean - mean.reshape(shape)) / std.reshape(shape))
    torch.testing.assert_close(after.std, before.std / std.reshape(shape))


def test_tokenizer_learns_whole_words_and_begins_and_ends():
    tokenizer = train_tokenizer(["a red heart", "a blue heart", "red apple"] * 20)
    ids = tokenizer("red heart").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", "red</w>", "heart</w>", "<|endoftext|>"]
    assert len(tokenizer) <= 2048


@pytest.mark.parametrize("caption", ["sphinx of black quartz", "1 2 3", "! - . ?", "日本"])
def test_tokenizer_knows_what_it_never_saw(caption: str):
    tokenizer = train_tokenizer(["a red heart"])
    ids = tokenizer(caption, add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).strip() == caption


def test_tokenizer_is_the_same_each_time():
    captions = ["a red heart, symbols & more", "grinning face", "the quick brown fox jumps over the lazy dog"]
    first, second = train_tokenizer(captions), train_tokenizer(captions)
    assert first.get_vocab() == second.get_vocab()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_autoencoder_learns_a_batch(tmp_path: Path):
    torch.manual_seed(0)
    losses = overfit(VaePretraining(**settings(tmp_path / "vae", 2e-3)), 12)
    assert losses[-1] < 0.75 * losses[0]
    assert AutoencoderKL.from_pretrained(tmp_path / "vae").config.scaling_factor == 1.0


def test_clip_learns_a_batch(tmp_path: Path):
    torch.manual_seed(0)
    losses = overfit(ClipPretraining(sources=[NOTO], **settings(tmp_path / "clip", 1e-3)), 15)
    assert losses[-1] < 0.7 * losses[0]
    assert CLIPModel.from_pretrained(tmp_path / "clip").config.text_config.vocab_size == 2048


def test_unet_learns_a_batch_and_is_saved_as_a_pipeline(tmp_path: Path):
    torch.manual_seed(0)
    ClipPretraining(sources=[NOTO], **settings(tmp_path / "clip", 1e-3)).save(tmp_path / "clip")
    tiny_vae().save_pretrained(tmp_path / "vae")
    module = UnetPretraining(
        vae=str(tmp_path / "vae"), clip=str(tmp_path / "clip"), **settings(tmp_path / "pipeline", 1e-3)
    )
    losses = overfit(module, 15, EMAWeightAveraging(decay=0.5, use_buffers=False))
    assert losses[-1] < 0.7 * losses[0]
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
    saved = pipeline.unet.conv_in.weight.float()
    torch.testing.assert_close(saved, module.model.unet.conv_in.weight, atol=1e-3, rtol=1e-3)
