"""Cached latents: the same training without VAE and text encoder, and never with those of another model."""

from __future__ import annotations

import csv
import http.server
import io
import json
import runpy
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from safetensors.numpy import load as load_bytes
from safetensors.numpy import save as save_bytes
from safetensors.torch import load_file, save_file

import train
from helpers.commands import ROOT
from helpers.photos import noise_jpeg
from helpers.pipelines import build_tiny_pipeline
from lcm_lightning.data import stream
from lcm_lightning.data.datamodule import CaptionedImages, iterate_split
from lcm_lightning.data.images import ImageFault, decode_image
from lcm_lightning.data.latents import latent_cache, read_rows
from lcm_lightning.data.records import Record
from lcm_lightning.data.shards import find_shards
from lcm_lightning.data.writing import ShardSettings, write_shards
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.models.adapters import LoraSettings, fuse_lora, load_lora
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.identity import cache_key, model_digest
from lcm_lightning.models.sampling import DDIM, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.prepare import encoding
from lcm_lightning.prepare.encoding import CacheSettings, cache_latents

RESOLUTION = 32
LORA = LoraSettings(rank=4, alpha=4, target_modules="attention")
# float16 keeps 11 binary digits of means, deviations and embeddings, so each is off by at most 2^-11 of itself; what
# that does to a loss is of the same order.
FLOAT16 = 4 * 2**-11
TRAINING = {
    "lora": partial(LoraFinetuning, lora=LORA, optimizer=torch.optim.AdamW),
    "lcm": partial(
        LcmLoraDistillation,
        lora=LORA,
        optimizer=torch.optim.AdamW,
        distillation=ConsistencyDistillation(num_ode_steps=10, loss="l2", huber_c=0.001),
    ),
}


def cache(
    images: Path, output: Path, pipeline: Path, *, teacher_lora: str | None = None, **settings: Any
) -> dict[str, Any]:
    """The index of the cache of a folder of shards by a pipeline."""
    model = load_stable_diffusion(str(pipeline))
    return cache_latents(
        find_shards(str(images)),
        output,
        images=str(images),
        model=model,
        key=cache_key(model, RESOLUTION, teacher_lora),
        settings=CacheSettings(**{"dtype": "float32", **settings}),
        batch_size=4,
        workers=1,
    )


@pytest.fixture(scope="module")
def square_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Square images, of which every crop is the whole: 11 train and 3 val samples of three captions in shards of 4."""
    folder = tmp_path_factory.mktemp("squares")

    def square(seed: int) -> bytes:
        cells = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        path = folder / "square.png"
        Image.fromarray(cells).resize((40, 40), Image.Resampling.BICUBIC).save(path)
        return path.read_bytes()

    records = [
        Record(f"{split}{n}", square(seed + n), tuple(f"{split} {n}, caption {c}" for c in range(3)), split)
        for split, samples, seed in (("train", 11, 0), ("val", 3, 100))
        for n in range(samples)
    ]
    write_shards(records, folder, name="squares", settings=ShardSettings(samples_per_shard=4), workers=1)
    return folder


@pytest.fixture(scope="module")
def square_latents(square_shards: Path, pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `square_shards`, mirror images included."""
    output = tmp_path_factory.mktemp("latents")
    cache(square_shards, output, pipeline_folder, flips=True)
    return output


def data(source: Path | str, **options: Any) -> CaptionedImages:
    defaults = {"resolution": RESOLUTION, "batch_size": 4, "num_workers": 0, "seed": 3, "caption_dropout": 0.3}
    return CaptionedImages("squares", str(source), **(defaults | options))


def batches(module: CaptionedImages, epoch: int = 0) -> list[dict[str, Any]]:
    loader = module.train_dataloader()
    loader.set_epoch(epoch)
    return [*loader, *module.val_dataloader()]


def deferred(pipeline: Path, latents: Path) -> StableDiffusion:
    """A model as a training on cached latents gets it."""
    model = load_stable_diffusion(str(pipeline), defer_encoders=True)
    empty = data(latents).cache.empty_condition(None)
    model.known_texts[""] = Condition(torch.from_numpy(empty["text"])[None])
    return model


@pytest.mark.parametrize("method", TRAINING)
def test_the_loss_is_that_of_images_but_for_the_rounding_of_the_cache(
    method: str, square_shards: Path, square_latents: Path, pipeline_folder: Path
):
    torch.manual_seed(0)
    from_images = TRAINING[method](load_stable_diffusion(str(pipeline_folder)))
    torch.manual_seed(0)
    from_latents = TRAINING[method](deferred(pipeline_folder, square_latents))
    from_latents.load_state_dict(from_images.state_dict(), strict=False)
    compared = 0
    for epoch in range(2):
        for images, latents in zip(
            batches(data(square_shards), epoch), batches(data(square_latents), epoch), strict=True
        ):
            assert "pixel_values" not in latents
            for field in ("captions", "keys"):
                assert images[field] == latents[field]
            assert torch.equal(images["seed"], latents["seed"]) and torch.equal(images["weight"], latents["weight"])
            expected, found = (
                module._batch_losses(batch, module.kind.name)
                for module, batch in ((from_images, images), (from_latents, latents))
            )
            torch.testing.assert_close(found, expected, rtol=FLOAT16, atol=0)
            assert len(set(expected.tolist())) > 1
            compared += len(images["keys"])
    assert compared == 2 * (12 + 4)
    assert set(from_latents.model.deferred) == {"vae", "text_encoder"}


def test_mirror_images_captions_and_dropout_are_chosen_as_from_images(
    square_shards: Path, square_latents: Path, tiny_model: StableDiffusion
):
    seen = set()
    for images, latents in zip(batches(data(square_shards)), batches(data(square_latents)), strict=True):
        mean, std = tiny_model.posterior(images["pixel_values"])
        torch.testing.assert_close(latents["moments"].float(), torch.stack([mean, std], 1), rtol=2**-11, atol=1e-6)
        text = tiny_model.encode_text(images["captions"]).text
        torch.testing.assert_close(latents["text"].float(), text, rtol=2**-11, atol=1e-6)
        seen |= {caption.partition(", ")[2] for caption in latents["captions"]}
    assert seen == {"", "caption 0", "caption 1", "caption 2"}


def test_validation_sees_the_centre_and_the_first_caption(
    flickr_shards: Path, pipeline_folder: Path, tmp_path: Path, tiny_model: StableDiffusion
):
    cache(flickr_shards, tmp_path / "latents", pipeline_folder, crops=3, flips=True)
    images, latents = (next(iter(data(f).val_dataloader())) for f in (flickr_shards, tmp_path / "latents"))
    assert images["captions"] == latents["captions"]
    mean = tiny_model.posterior(images["pixel_values"])[0]
    torch.testing.assert_close(latents["moments"][:, 0].float(), mean, rtol=2**-11, atol=1e-6)


def members(tar: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(tar) as archive:
        yield from ((member.name, archive.extractfile(member).read()) for member in archive)


def test_several_crops_are_kept_the_centre_first_each_beside_its_mirror_image(
    flickr_shards: Path, pipeline_folder: Path, tmp_path: Path, tiny_model: StableDiffusion
):
    cache(flickr_shards, tmp_path, pipeline_folder, crops=3, flips=True)
    name, content = next(m for m in members(tmp_path / "train-000000.tar") if m[0].endswith(".safetensors"))
    tensors = load_bytes(content)
    assert tensors["moments"].shape == (6, 2, 4, 8, 8) and tensors["text"].shape == (5, 16, 32)
    picture = {s.key: s.image for s in iterate_split(str(flickr_shards), "train")}[name.partition(".")[0]]
    picture = picture.resize((38, 32), Image.Resampling.BICUBIC).crop((3, 0, 35, 32))
    pixels = torch.tensor(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    for row, image in enumerate((pixels, pixels.flip(-1))):
        mean, std = tiny_model.posterior(image)
        expected = torch.cat([mean, std])
        torch.testing.assert_close(torch.from_numpy(tensors["moments"][row]).float(), expected, rtol=2**-10, atol=1e-5)
    assert len({tensors["moments"][row].tobytes() for row in range(6)}) == 6


def test_every_crop_is_trained_on(flickr_shards: Path, pipeline_folder: Path, tmp_path: Path):
    cache(flickr_shards, tmp_path, pipeline_folder, crops=3)
    module = data(tmp_path, flip_probability=0)
    seen: dict[str, set[bytes]] = {}
    for epoch in range(30):
        loader = module.train_dataloader()
        loader.set_epoch(epoch)
        for batch in loader:
            for key, moments in zip(batch["keys"], batch["moments"], strict=True):
                seen.setdefault(key, set()).add(moments.numpy().tobytes())
    cached = {
        name.partition(".")[0]: {row.tobytes() for row in load_bytes(content)["moments"]}
        for shard in tmp_path.glob("train-*.tar")
        for name, content in members(shard)
        if name.endswith(".safetensors")
    }
    assert seen == cached and len(cached) == 24


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_the_shuffle_buffer_change_nothing_a_sample_holds(square_latents: Path, workers: int):
    def by_key(module: CaptionedImages) -> dict[str, tuple[bytes, bytes, str]]:
        return {
            key: (batch["moments"][row].numpy().tobytes(), batch["text"][row].numpy().tobytes(), batch["captions"][row])
            for batch in batches(module)
            for row, key in enumerate(batch["keys"])
        }

    assert by_key(data(square_latents)) == by_key(data(square_latents, num_workers=workers, shuffle_buffer=2))


def test_the_encoders_are_read_when_something_is_drawn(
    pipeline_folder: Path, square_latents: Path, tiny_model: StableDiffusion
):
    model = deferred(pipeline_folder, square_latents)
    assert not any(name.startswith(("vae.", "text_encoder.")) for name in model.state_dict())
    drawing = {"seeds": [0, 1], "steps": 2, "guidance_scale": 3.0, "sampler": DDIM, "resolution": RESOLUTION}
    state = torch.get_rng_state()
    with torch.inference_mode():
        drawn = sample(model, ["a dog", "a cat"], **drawing)
    assert torch.equal(torch.get_rng_state(), state)
    # The empty caption comes out of the cache.
    torch.testing.assert_close(drawn, sample(tiny_model, ["a dog", "a cat"], **drawing), rtol=0, atol=2e-3)
    assert not model.deferred
    weights = [*model.vae.parameters(), *model.text_encoder.parameters()]
    assert weights and not any(w.requires_grad or w.is_inference() for w in weights)
    assert model.state_dict().keys() == tiny_model.state_dict().keys()


def test_random_weights_are_deferred_too():
    model = load_stable_diffusion("", dtype=torch.bfloat16, unet_init="random", defer_encoders=True)
    assert sum(p.numel() for p in model.parameters()) == 859_520_964
    assert model.latent_shape(512) == (4, 64, 64) and model.vae_config.scaling_factor == 0.18215
    assert cache_key(model, 512, None)["vae"] == "random"
    assert model.deferred["vae"].read().encoder.conv_in.weight.dtype == torch.bfloat16


@pytest.fixture
def other_pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    build_tiny_pipeline(seed=1).save_pretrained(folder)
    return folder


def test_a_cache_of_another_model_is_refused_by_what_differs(
    square_latents: Path, pipeline_folder: Path, other_pipeline: Path
):
    made = data(square_latents).cache
    mine = cache_key(load_stable_diffusion(str(pipeline_folder), defer_encoders=True), RESOLUTION, None)
    made.check(mine)
    other = cache_key(load_stable_diffusion(str(other_pipeline)), 64, None)
    with pytest.raises(UserError) as refusal:
        made.check(other)
    for part in ("vae", "text_encoder", "resolution"):
        assert f"{part}: the cache has {mine[part]}, this run {other[part]}" in str(refusal.value)
    assert "tokenizer:" not in str(refusal.value) and "cache=latents" in str(refusal.value)


def test_the_key_is_of_the_weights_wherever_they_lie_and_whatever_type_they_are_read_in(
    pipeline_folder: Path, tmp_path: Path
):
    copied = shutil.copytree(pipeline_folder, tmp_path / "copy")
    vae = copied / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(dict(reversed(load_file(vae).items())), vae, {"format": "pt", "written": "anew"})
    keys = [
        cache_key(load_stable_diffusion(str(folder), dtype=dtype), RESOLUTION, None)
        for folder, dtype in ((pipeline_folder, torch.float32), (copied, torch.bfloat16))
    ]
    assert keys[0] == keys[1]
    tensors = load_file(vae)
    tensors["encoder.conv_in.weight"][0, 0, 0, 0] += 1e-6
    save_file(tensors, vae, {"format": "pt"})
    changed = cache_key(load_stable_diffusion(str(copied)), RESOLUTION, None)
    assert {part for part in changed if changed[part] != keys[0][part]} == {"vae"}


def test_only_a_lora_on_the_text_encoder_makes_another_key(
    pipeline_folder: Path, tiny_model: StableDiffusion, tmp_path
):
    def write(prefix: str, layer: str, width: int) -> Path:
        path = tmp_path / f"{prefix}.safetensors"
        down = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
        save_file(
            {f"{prefix}.{layer}.lora_A.weight": down, f"{prefix}.{layer}.lora_B.weight": down.T.contiguous()}, path
        )
        return path

    on_text = write("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj", 32)
    on_unet = write("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 64)
    bare = cache_key(tiny_model, RESOLUTION, None)
    assert cache_key(tiny_model, RESOLUTION, str(on_unet)) == bare
    adapted = cache_key(tiny_model, RESOLUTION, str(on_text))
    assert {part for part in bare if bare[part] != adapted[part]} == {"text_encoder"}
    assert adapted["text_encoder"].startswith(bare["text_encoder"])
    load_lora(tiny_model, on_text, "style")  # so these are the names that act on the text encoder


def test_mirror_images_that_are_not_there_are_not_replaced_by_others(
    square_shards: Path, pipeline_folder: Path, tmp_path: Path
):
    cache(square_shards, tmp_path, pipeline_folder)
    with pytest.raises(UserError, match=r"data.flip_probability=0.5.*cache.flips=true"):
        data(tmp_path, flip_probability=0.5).prepare_data()
    data(tmp_path, flip_probability=0).prepare_data()


def test_an_interrupted_cache_goes_on_where_it_stopped(
    square_shards: Path, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def until_the_third(task, *arguments):
        if task.file == "train-000002.tar":
            raise KeyboardInterrupt
        return write(task, *arguments)

    write = encoding.write_latents
    monkeypatch.setattr(encoding, "write_latents", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        cache(square_shards, tmp_path / "a", pipeline_folder)
    with pytest.raises(UserError, match="did not finish"):
        find_shards(str(tmp_path / "a"))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.tar")}
    assert len(before) == 2
    monkeypatch.undo()
    resumed = cache(square_shards, tmp_path / "a", pipeline_folder)
    assert {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in before} == before
    assert resumed == cache(square_shards, tmp_path / "b", pipeline_folder)
    assert not list(tmp_path.rglob("*.tmp"))


def test_neither_images_nor_another_model_s_cache_are_overwritten(
    square_shards: Path, pipeline_folder: Path, other_pipeline: Path, tmp_path: Path
):
    cache(square_shards, tmp_path / "latents", pipeline_folder)
    with pytest.raises(UserError, match=r"cache.output=.*another text_encoder, vae"):
        cache(square_shards, tmp_path / "latents", other_pipeline)
    with pytest.raises(UserError, match=r"cache.output=.*shards of images"):
        cache(square_shards, square_shards, pipeline_folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plain_shards(folder: Path) -> Path:
    """Shards of images as people publish them: without an index, and under the names a cache would use."""
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as archive:
            for name, content in (("a.jpg", noise_jpeg(0)), ("a.txt", b"a")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("output", ["images", "link", "elsewhere", "above"])
def test_shards_without_an_index_are_never_overwritten(pipeline_folder: Path, tmp_path: Path, output: str):
    images = plain_shards(tmp_path / "set" / "images")
    plain_shards(tmp_path / "set" / "elsewhere")
    (tmp_path / "set" / "link").symlink_to(images)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"cache.output=.*another folder"):
        cache(images, tmp_path / "set" / ("" if output == "above" else output), pipeline_folder)
    assert contents(tmp_path) == before


def test_an_unfinished_cache_of_another_model_is_not_overwritten(
    square_shards: Path,
    pipeline_folder: Path,
    other_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def until_the_second(task, *arguments):
        if task.file == "train-000001.tar":
            raise KeyboardInterrupt
        return write(task, *arguments)

    write = encoding.write_latents
    monkeypatch.setattr(encoding, "write_latents", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        cache(square_shards, tmp_path / "a", pipeline_folder)
    monkeypatch.undo()
    before = contents(tmp_path / "a")
    with pytest.raises(UserError, match=r"cache.output=.*another text_encoder, vae"):
        cache(square_shards, tmp_path / "a", other_pipeline)
    assert contents(tmp_path / "a") == before
    cache(square_shards, tmp_path / "a", pipeline_folder)


def test_a_cache_is_made_anew_without_its_notes_and_with_other_settings(
    square_shards: Path, pipeline_folder: Path, tmp_path: Path
):
    first = cache(square_shards, tmp_path / "a", pipeline_folder)
    shutil.rmtree(tmp_path / "a" / ".parts")
    again = cache(square_shards, tmp_path / "a", pipeline_folder, flips=True)
    assert again["latents"] == first["latents"] | {"flips": True}
    assert again == cache(square_shards, tmp_path / "b", pipeline_folder, flips=True)


@pytest.mark.parametrize("damage", ["{", "[]", '{"latents": {"key": 3}, "splits": {}}', "[" * 100_000])
def test_a_cache_with_a_damaged_index_is_not_overwritten(
    square_shards: Path, square_latents: Path, pipeline_folder: Path, tmp_path: Path, damage: str
):
    folder = shutil.copytree(square_latents, tmp_path / "copy")
    (folder / "index.json").write_text(damage)
    before = contents(folder)
    with pytest.raises(UserError, match=r"cache.output=.*index.json there is damaged"):
        cache(square_shards, folder, pipeline_folder)
    assert contents(folder) == before


def test_what_cannot_be_used_is_left_out_and_named(pipeline_folder: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for name, content in (
            ("a.jpg", noise_jpeg(0)),
            ("a.txt", b"a"),
            ("b.jpg", b"no image"),
            ("b.txt", b"b"),
            ("c.jpg", noise_jpeg(1)),
            ("c.txt", b"\n"),
        ):
            path = tmp_path / "member"
            path.write_bytes(content)
            archive.add(path, name)
    index = cache(tmp_path, tmp_path / "latents", pipeline_folder)
    assert index["splits"]["train"]["samples"] == 1
    assert index["skipped"] == {"undecodable": 1, "no caption": 1}
    assert "b,train-0.tar" in (tmp_path / "latents" / "skipped.csv").read_text()


def test_a_cache_outlives_a_call_in_which_no_image_can_be_used(
    square_shards: Path, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unreadable(data: bytes) -> Image.Image:
        raise ImageFault("undecodable")

    cache(square_shards, tmp_path, pipeline_folder)
    before = contents(tmp_path)
    monkeypatch.setattr(encoding, "decode_image", unreadable)
    with pytest.raises(UserError, match="none of the 14 images"):
        cache(square_shards, tmp_path, pipeline_folder, dtype="bfloat16")
    of_the_call = ("skipped.csv", ".parts/cache.json")
    assert all(contents(tmp_path)[name] == data for name, data in before.items() if name not in of_the_call)
    data(tmp_path, flip_probability=0).prepare_data()


def test_an_evaluation_finds_the_images_of_cached_latents(square_shards: Path, square_latents: Path):
    keys = [sample.key for sample in iterate_split(str(square_latents), "val")]
    assert keys == [sample.key for sample in iterate_split(str(square_shards), "val")] and len(keys) == 3


def test_latents_are_read_from_a_web_server(square_latents: Path, tmp_path: Path):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(square_latents))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        served = batches(data(address, cache_dir=str(tmp_path)))
        server.shutdown()
    for here, there in zip(batches(data(square_latents)), served, strict=True):
        assert here["keys"] == there["keys"] and here["captions"] == there["captions"]
        assert torch.equal(here["moments"], there["moments"]) and torch.equal(here["text"], there["text"])


def test_the_empty_caption_of_another_text_encoder_is_not_read_from_the_download_cache(
    square_latents: Path, tmp_path: Path
):
    folder = shutil.copytree(square_latents, tmp_path / "copy")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        index = find_shards(address)
        first = latent_cache(index, address)
        text = first.empty_condition(str(tmp_path))["text"]
        save_file({"text": torch.from_numpy(text + 1)}, folder / Path(first.empty_caption).name)
        assert np.array_equal(first.empty_condition(str(tmp_path))["text"], text)
        second = replace(first, key={**first.key, "text_encoder": "another"})
        assert np.array_equal(second.empty_condition(str(tmp_path))["text"], text + 1)
        server.shutdown()


def test_images_that_are_gone_are_asked_for(square_latents: Path, tmp_path: Path):
    folder = shutil.copytree(square_latents, tmp_path / "copy")
    index = json.loads((folder / "index.json").read_text())
    index["latents"]["images"] = "/nowhere/at/all"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="/nowhere/at/all"):
        next(iterate_split(str(folder), "val"))
    data(folder).prepare_data()  # training can do without them


def test_a_row_is_read_as_the_safetensors_library_reads_it(tmp_path: Path):
    tensors = {
        "text": np.random.default_rng(0).standard_normal((5, 7, 3)).astype(np.float16),
        "moments": np.random.default_rng(1).standard_normal((4, 2, 4, 3, 3)).astype(np.float16),
    }
    content = save_bytes(tensors)
    (tmp_path / "file").write_bytes(b"x" * 37 + content)
    for text, moments in ((0, 0), (4, 3), (2, 1)):
        read = read_rows(tmp_path / "file", 37, {"text": text, "moments": moments})
        expected = load_bytes(content)
        assert np.array_equal(read["text"], expected["text"][text])
        assert np.array_equal(read["moments"], expected["moments"][moments])


@pytest.mark.parametrize("cut", [0, 5, 30, 60, 150])
def test_damage_is_a_fault_of_that_sample(tmp_path: Path, cut: int):
    content = save_bytes({"text": np.ones((2, 40), np.float16)})
    (tmp_path / "file").write_bytes(content[:cut])
    with pytest.raises(ImageFault, match="damaged latents"):
        read_rows(tmp_path / "file", 0, {"text": 1})


def test_a_damaged_sample_is_left_out_of_its_batch(
    square_shards: Path, pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    cache(square_shards, tmp_path, pipeline_folder)
    shard = tmp_path / "train-000000.tar"
    with tarfile.open(shard) as archive:
        first = next(member for member in archive if member.name.endswith(".safetensors"))
    with shard.open("r+b") as file:
        file.seek(first.offset_data)
        file.write(b"\xff" * 64)
    module = data(tmp_path, flip_probability=0, max_bad_fraction=0.5)
    loader = module.train_dataloader()
    loader.set_epoch(0)
    kept = {key for batch in loader for key, weight in zip(batch["keys"], batch["weight"], strict=True) if weight > 0}
    assert len(kept) == 10 and first.name.partition(".")[0] not in kept
    assert "damaged latents" in caplog.text


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_damaged_header_costs_one_sample(
    square_shards: Path, pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
):
    cache(square_shards, tmp_path, pipeline_folder)
    shard = tmp_path / "train-000000.tar"
    with tarfile.open(shard) as archive:
        first = next(member for member in archive if member.name.endswith(suffix))
    with shard.open("r+b") as file:
        file.seek(first.offset)
        file.write(b"\xff" * 512)
    loader = data(tmp_path, flip_probability=0, max_bad_fraction=0.5).train_dataloader()
    loader.set_epoch(0)
    kept = {key for batch in loader for key, weight in zip(batch["keys"], batch["weight"], strict=True) if weight > 0}
    assert len(kept) == 10 and first.name.partition(".")[0] not in kept
    assert loader.bad_samples == 1 and f"left out: shard {shard}" in caplog.text


@pytest.mark.parametrize(
    "description",
    [
        b"",
        b"[" * 100_000,
        b"[]",
        b'{"captions": []}',
        b'{"captions": [3], "image_shard": "a"}',
        b'{"captions": ["a", "b", "c"], "image_shard": "a", "time_ids": [[1, 2], [1, 2]]}',
        b'{"captions": ["a", "b", "c"], "image_shard": "a", "time_ids": 6}',
        b" " * (2 << 20),
    ],
)
def test_a_damaged_description_costs_one_sample(square_latents: Path, tmp_path: Path, description: bytes):
    folder = shutil.copytree(square_latents, tmp_path / "copy")
    shard = folder / "train-000000.tar"
    found = list(members(shard))
    with tarfile.open(shard, "w") as archive:
        for number, (name, content) in enumerate(found):
            member = tarfile.TarInfo(name)
            member.size = len(description if number == 0 else content)
            archive.addfile(member, io.BytesIO(description if number == 0 else content))
    index = json.loads((folder / "index.json").read_text())
    index["splits"]["train"]["shards"][0]["bytes"] = shard.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    loader = data(folder, max_bad_fraction=0.5).train_dataloader()
    loader.set_epoch(0)
    kept = {key for batch in loader for key, weight in zip(batch["keys"], batch["weight"], strict=True) if weight > 0}
    assert len(kept) == 10 and loader.bad_samples == 1


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"text": {"dtype": "F16", "shape": [2, 40], "data_offsets": [0, 281474976710656]}}',
        b'{"text": {"dtype": "F16", "shape": [2, 40], "data_offsets": [9, 0]}}',
        b'{"text": {"dtype": "F16", "shape": [0, 40], "data_offsets": [0, 0]}}',
    ],
)
def test_a_header_that_means_harm_is_a_fault_of_that_sample(tmp_path: Path, header: bytes):
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + b"x" * 160)
    with pytest.raises(ImageFault, match="damaged latents"):
        read_rows(tmp_path / "file", 0, {"text": 1})
    (tmp_path / "file").write_bytes((1 << 40).to_bytes(8, "little") + header)
    with pytest.raises(ImageFault, match="damaged latents: a header of 1099511627776 bytes"):
        read_rows(tmp_path / "file", 0, {"text": 1})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "has format 2, this version of lcm-lightning reads 1"),
        ({"latents": {"key": {}}}, "run prepare again"),
        ({"latents": []}, "run prepare again"),
        ({"crops": "two"}, "crops is two"),
        ({"latent_shape": 4}, "index.json is none of cached latents"),
        ({"latent_shape": ["a", 1, 1]}, "latent_shape is"),
        ({"pyramid": 3}, "index.json is none of cached latents"),
        ({"key": None}, "key is None"),
    ],
)
def test_an_index_of_others_is_one_message(square_latents: Path, tmp_path: Path, change: dict[str, Any], said: str):
    folder = shutil.copytree(square_latents, tmp_path / "copy")
    index = json.loads((folder / "index.json").read_text())
    for name, value in change.items():
        (index if name in index else index["latents"])[name] = value
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"data\.source") as refusal:
        data(folder).prepare_data()
    assert said in str(refusal.value)


@pytest.mark.parametrize("content", [None, b"", b"no tensors", save_bytes({"other": np.zeros(1, np.float16)})])
def test_a_cache_without_its_empty_caption_is_one_message(square_latents: Path, tmp_path: Path, content: bytes | None):
    folder = shutil.copytree(square_latents, tmp_path / "copy")
    place = folder / "empty_caption.safetensors"
    place.unlink() if content is None else place.write_bytes(content)
    with pytest.raises(UserError, match=r"empty_caption.safetensors is missing or damaged"):
        data(folder).train_dataloader()


def test_a_teacher_s_lora_is_fused_without_reading_the_encoders(
    pipeline_folder: Path, square_latents: Path, tiny_model: StableDiffusion, tmp_path: Path
):
    down = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    path = tmp_path / "teacher.safetensors"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": down.T.contiguous()}, path)
    before = tiny_model.unet.get_submodule(layer.removeprefix("unet.")).weight.clone()
    model = deferred(pipeline_folder, square_latents)
    fuse_lora(model, path)
    torch.testing.assert_close(
        model.unet.get_submodule(layer.removeprefix("unet.")).weight, before + down.T @ down, rtol=1e-5, atol=1e-4
    )
    assert set(model.deferred) == {"vae", "text_encoder"}


def test_waiting_for_batches_is_timed_and_nothing_else(flickr_shards: Path, monkeypatch: pytest.MonkeyPatch):
    def slowly(content: bytes) -> Image.Image:
        time.sleep(0.01)
        return decode_image(content)

    monkeypatch.setattr(stream, "decode_image", slowly)
    loader = data(flickr_shards, batch_size=6).train_dataloader()
    loader.set_epoch(0)
    started = time.perf_counter()
    for _ in loader:
        time.sleep(0.1)
    assert 24 * 0.01 <= loader.waited <= time.perf_counter() - started - 4 * 0.1


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs prepare or train.py in this process and in `tmp_path`; returns what it said, after a status other than 0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(program: str, *options: object) -> str:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [program, f"--config-path={ROOT / 'conf'}", *map(str, options)])
        capfd.readouterr()
        status = ""
        try:
            train.main() if program == "train" else runpy.run_module("lcm_lightning.prepare", run_name="__main__")
        except SystemExit as end:
            status = f"{end.code} "
        GlobalHydra.instance().clear()
        return status + "".join(capfd.readouterr())

    return run


def photos(folder: Path) -> Path:
    """Twenty captioned photos as people have them."""
    for split, samples in (("train", 16), ("val", 4)):
        (folder / split).mkdir(parents=True)
        for n in range(samples):
            (folder / split / f"{n}.jpg").write_bytes(noise_jpeg(n))
            (folder / split / f"{n}.txt").write_text(f"photo {n}\n{split}\n")
    return folder


SMALL = (
    "debug=fdr",
    "logger=csv",
    "method.lora.rank=4",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.resolution=32",
    "data.val_limit=2",
    "callbacks.samples.teacher_steps=2",
    "callbacks.samples.student_steps=[1]",
    "trainer.accumulate_grad_batches=1",
)


@pytest.mark.parametrize("experiment", ["lora_flickr8k", "lcm_flickr8k"])
def test_from_photos_to_a_run_on_latents(
    command: Callable[..., str], tmp_path: Path, pipeline_folder: Path, experiment: str, monkeypatch: pytest.MonkeyPatch
):
    model = ("model=sd15", f"model.path={pipeline_folder}")
    source = f"data.source={photos(tmp_path / 'photos')}"
    options = ("data=folder", source, "prepare.workers=1", "data.resolution=32", "cache=latents", "cache.dtype=float32")
    said = command("prepare", *options, *model)
    ready = "experiment=lora_folder data.source=data/folder-latents data.resolution=32"
    assert f"Ready: python train.py {ready} model=sd15 " in said
    again = command("prepare", "data=folder", "data.resolution=32", "cache=latents", "cache.dtype=float32", *model)
    assert "2 shards kept" in again

    reads = []
    load_encoders = StableDiffusion.load_encoders
    monkeypatch.setattr(
        StableDiffusion,
        "load_encoders",
        lambda self, *names: (reads.extend(self.deferred.keys() & names), load_encoders(self, *names)),
    )
    places = ("data=folder", "data.source=data/folder-latents", *model)
    said = command("train", f"experiment={experiment}", *SMALL, *places, "hydra.run.dir=run", "max_steps=2")
    assert "run folder: run" in said
    assert sorted(reads) == ["text_encoder", "vae"] and (tmp_path / "run" / "samples" / "step_000002.png").is_file()
    with (tmp_path / "run" / "metrics.csv").open() as file:
        waits = [float(row["train/data_wait_fraction"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(waits) == 2 and all(0 < wait < 1 for wait in waits)
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").data.source == "data/folder-latents"

    reads.clear()
    command(
        "train",
        f"experiment={experiment}",
        *SMALL,
        *places,
        "hydra.run.dir=blind",
        "max_steps=1",
        "callbacks.samples=null",
    )
    assert (tmp_path / "blind" / "checkpoints" / "last.ckpt").is_file() and not reads

    said = command("train", f"experiment={experiment}", *SMALL, *places, "hydra.run.dir=large", "data.resolution=64")
    assert said.startswith("2 ") and "error: data.source=data/folder-latents" in said
    assert "resolution: the cache has 32, this run 64" in said


def test_latents_and_training_are_of_the_model_s_own_size_unless_told(
    command: Callable[..., str], tmp_path: Path, pipeline_folder: Path
):
    model = ("model=sd15", f"model.path={pipeline_folder}")
    options = ("data=folder", f"data.source={photos(tmp_path / 'photos')}", "prepare.workers=1")
    said = command("prepare", *options, "cache=latents", "cache.dtype=float32", *model)
    assert "experiment=lora_folder data.source=data/folder-latents model=sd15 " in said
    index = json.loads((tmp_path / "data" / "folder-latents" / "index.json").read_text())
    assert index["latents"]["key"]["resolution"] == "32"
    small = [option for option in SMALL if not option.startswith("data.resolution")]
    command(
        "train", "experiment=lora_folder", *small, *model, "data.source=data/folder-latents", "hydra.run.dir=latents"
    )
    command("train", "experiment=lcm_folder", *small, *model, "hydra.run.dir=images")
    for run in ("latents", "images"):
        assert OmegaConf.load(tmp_path / run / "config.yaml").data.resolution == 32
        with Image.open(tmp_path / run / "samples" / "step_000002.png") as grid:
            assert grid.width == 200 + 2 * (128 + 8) + 8  # enlarged from 32


def test_photos_are_trained_on_at_64_px_by_the_embedded_pipeline(command: Callable[..., str], tmp_path: Path):
    command("prepare", "data=folder", f"data.source={photos(tmp_path / 'photos')}", "prepare.workers=1")
    small = [option for option in SMALL if not option.startswith("data.resolution")]
    options = ("model=tiny", "hydra.run.dir=run", "max_steps=1", "callbacks.samples=null")
    said = command("train", "experiment=lora_folder", *small, *options)
    assert "run folder: run" in said
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").data.resolution == 64


def test_a_method_without_a_model_wants_a_size(command: Callable[..., str], flickr_shards: Path):
    options = ("debug=fdr", "data=flickr8k", f"data.source={flickr_shards}", "data.num_workers=0")
    said = command("train", "experiment=pretrain_vae", *options)
    assert said.startswith("2 ") and "error: data.resolution=null: method pretrain_vae has no model" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "error: cache=latents: whose? give the model"),
        (("model=sd15", "model.unet_init=random", "data.resolution=33"), "error: data.resolution=33"),
        (("cache.crops=0", "model=sd15"), "error: cache.crops=0: expected a whole number, at least 1"),
        (("cache.flips=3", "model=sd15"), "error: cache.flips=3: expected true or false"),
        (("cache.dtype=int8", "model=sd15"), "error: dtype=int8"),
        (("cache.teacher_lora=./nowhere", "model=tiny", "data.resolution=64"), "error: cache.teacher_lora=./nowhere"),
    ],
)
def test_a_mistake_is_one_message(command: Callable[..., str], tmp_path: Path, options: tuple[str, ...], message: str):
    said = command("prepare", "data=folder", f"data.source={photos(tmp_path / 'photos')}", "cache=latents", *options)
    assert said.startswith("2 ") and message in said and "Traceback" not in said
    assert not (tmp_path / "data").exists()


def test_what_trains_the_networks_themselves_wants_images(command: Callable[..., str], square_latents: Path):
    said = command("train", "experiment=pretrain_vae", f"data.source={square_latents}", "debug=fdr", "logger=csv")
    assert said.startswith("2 ") and "holds cached latents" in said


def test_a_model_whose_encoders_were_put_off_has_the_digest_of_one_that_is_whole(pipeline_folder: Path):
    deferred = load_stable_diffusion(str(pipeline_folder), defer_encoders=True)
    assert model_digest(deferred) == model_digest(load_stable_diffusion(str(pipeline_folder)))


def test_an_encoder_that_could_not_be_read_is_asked_for_again(pipeline_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "pipeline"))
    model = load_stable_diffusion(str(folder), defer_encoders=True)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "aside")
    with pytest.raises((OSError, UserError)):
        model.decode_latents(torch.zeros(1, 4, 8, 8))
    (folder / "aside").rename(weights)
    assert model.decode_latents(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 32, 32)
    assert list(model.deferred) == ["text_encoder"]  # which nothing has needed
