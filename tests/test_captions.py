"""Captions of any length: whole words, in as many chunks as are asked for, by transformers' own text encoders."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from helpers.adapters import randomise
from helpers.commands import SMALL, in_process
from helpers.photos import noise_jpeg, small_batches
from helpers.pipelines import TINY_TEXT_LENGTH
from lcm_lightning.data.records import Record
from lcm_lightning.data.shards import find_shards
from lcm_lightning.data.writing import ShardSettings, write_shards
from lcm_lightning.errors import UserError
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.models import captions as captions_module
from lcm_lightning.models.adapters import LoraSettings
from lcm_lightning.models.architectures import CLIP_L, OPENCLIP, byte_tokenizer
from lcm_lightning.models.captions import padded_ids, split_captions
from lcm_lightning.models.identity import cache_key, model_digest
from lcm_lightning.models.sampling import DDIM, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.prepare.encoding import CacheSettings, cache_latents

EQUAL = 1e-5  # both sides do the same operations in float32, but for the order of a batch
# Of the small tokenizer, a token a letter, 14 fit: what a caption's chunks are, counted by hand.
CHUNKS = {
    "": ["", "", ""],
    "two children": ["two children", "", ""],
    "a dog on a beach and two children run": ["a dog on a beach", "and two children", "run"],
    "an old man reads and some women sing a song now": ["an old man reads", "and some women", "sing a song now"],
    "a dog on a beach and two children run to that distant lake": [
        "a dog on a beach",
        "and two children",
        "run to that",
    ],
}


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has not warned of a cut caption."""
    monkeypatch.setattr(captions_module, "TOLD", [])


def ids_by_tokenizer(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    length = tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


# ---- tokens --------------------------------------------------------------------------------------------------------

TOKENIZERS = pytest.mark.parametrize(
    "tokenizer", [CLIP_L(), OPENCLIP(), byte_tokenizer(514, 77)], ids=["CLIP", "OpenCLIP", "bytes"]
)


@TOKENIZERS
def test_captions_that_fit_have_the_tokenizer_s_own_ids(tokenizer: CLIPTokenizer):
    captions = ["", "a dog, running!", "Zwei Männer; 37 % größer", "naïve café — 犬 🐕", " x", "a <|endoftext|> b"]
    captions.append(" ".join(["a"] * 75))
    found = padded_ids(tokenizer, split_captions(tokenizer, captions), 1)
    assert torch.equal(found, ids_by_tokenizer(tokenizer, captions))


@TOKENIZERS
def test_longer_ones_are_the_most_whole_words_that_fit(tokenizer: CLIPTokenizer):
    words = ["Ein", "unvorstellbar", "aufmerksamer", "Schäferhund", "bewacht", "seine", "Schafe", ",", "kurzum"] * 8
    split = split_captions(tokenizer, [" ".join(words)])
    expected, rest = [], words
    while rest:
        fit = max(n for n in range(len(rest) + 1) if len(tokenizer(" ".join(rest[:n])).input_ids) <= 77)
        expected.append(ids_by_tokenizer(tokenizer, [" ".join(rest[:fit])])[0])
        rest = rest[fit:]
    assert len(expected) > 1 == len(split)
    for number in (1, 2, len(expected)):
        assert torch.equal(padded_ids(tokenizer, split, number), torch.stack(expected[:number]))


@TOKENIZERS
def test_a_word_longer_than_a_chunk_is_cut_where_the_tokenizer_cuts_it(tokenizer: CLIPTokenizer):
    captions = ["犬が走る" * 60, "a dog: " + "vwxyz" * 90]
    assert torch.equal(
        padded_ids(tokenizer, split_captions(tokenizer, captions), 1), ids_by_tokenizer(tokenizer, captions)
    )


# ---- embeddings ----------------------------------------------------------------------------------------------------


def by_hand(folder: Path, name: str, kind: type[CLIPTextModel], chunks: list[list[str]], layer: int) -> Tensor:
    """Each chunk through the text encoder by itself, one after the other."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{name}", model_max_length=TINY_TEXT_LENGTH)
    encoder = kind.from_pretrained(folder / f"text_encoder{name}")
    rows = []
    with torch.no_grad():
        for of_caption in chunks:
            outputs = [encoder(ids_by_tokenizer(tokenizer, [c]), output_hidden_states=True) for c in of_caption]
            states = [out.last_hidden_state if layer == 0 else out.hidden_states[layer] for out in outputs]
            rows.append(torch.cat(states, dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_embeddings_are_those_of_the_chunks_side_by_side(pipeline_folder: Path, number: int):
    model = load_stable_diffusion(str(pipeline_folder), prompt_chunks=number)
    chunks = [of_caption[:number] for of_caption in CHUNKS.values()]
    found = model.encode_text(list(CHUNKS))
    assert found.text.shape == (5, number * TINY_TEXT_LENGTH, 32) and found.pooled is None
    torch.testing.assert_close(found.text, by_hand(pipeline_folder, "", CLIPTextModel, chunks, 0), atol=EQUAL, rtol=0)


@pytest.mark.parametrize("number", [1, 3])
def test_sdxl_s_pooled_embedding_is_that_of_the_first_chunk(sdxl_folder: Path, number: int):
    model = load_stable_diffusion(str(sdxl_folder), prompt_chunks=number)
    captions = list(CHUNKS)[1:]
    chunks = [CHUNKS[caption][:number] for caption in captions]
    found = model.encode_text(captions)
    states = [
        by_hand(sdxl_folder, "", CLIPTextModel, chunks, -2),
        by_hand(sdxl_folder, "_2", CLIPTextModelWithProjection, chunks, -2),
    ]
    torch.testing.assert_close(found.text, torch.cat(states, dim=-1), atol=EQUAL, rtol=0)
    first = load_stable_diffusion(str(sdxl_folder)).encode_text([of_caption[0] for of_caption in chunks])
    torch.testing.assert_close(found.pooled, first.pooled, atol=EQUAL, rtol=0)
    empty = model.encode_text([""])
    assert empty.text.shape[1] == number * TINY_TEXT_LENGTH and not empty.text.any() and not empty.pooled.any()


def test_pictures_are_what_diffusers_draws_from_these_embeddings(pipeline_folder: Path):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    prompt = "a dog on a beach and two children run"
    embeds = {
        name: by_hand(pipeline_folder, "", CLIPTextModel, [CHUNKS[text]], 0)
        for name, text in (("prompt_embeds", prompt), ("negative_prompt_embeds", ""))
    }
    options = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 7.5, "output_type": "pt"}
    expected = pipeline(**embeds, **options, generator=torch.Generator().manual_seed(3)).images
    drawn = {"seeds": [3], "steps": 4, "guidance_scale": 7.5, "sampler": DDIM, "resolution": 32}
    found, cut = (
        sample(load_stable_diffusion(str(pipeline_folder), prompt_chunks=number), [prompt], **drawn)
        for number in (3, 1)
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(found, cut, atol=1e-2)


# ---- what is said --------------------------------------------------------------------------------------------------


def test_the_first_caption_that_is_cut_is_told_once_in_a_process(pipeline_folder: Path, sdxl_folder: Path, caplog):
    for folder in (pipeline_folder, sdxl_folder):
        model = load_stable_diffusion(str(folder), prompt_chunks=2)
        with caplog.at_level(logging.WARNING):
            model.encode_text(list(CHUNKS))
            model.encode_text([list(CHUNKS)[-1]])
        assert model.cut_captions == 4
    (said,) = caplog.messages
    assert said.startswith("a caption of 29 tokens is cut to its first words, of 28 tokens at most, ")
    assert "'a dog on a beach and two children run'; shorten it, " in said and said.endswith("model.prompt_chunks=3")


def test_nothing_is_said_of_captions_that_fit(pipeline_folder: Path, caplog):
    model = load_stable_diffusion(str(pipeline_folder), prompt_chunks=3)
    model.encode_text(list(CHUNKS)[:4])
    assert model.cut_captions == 0 and not caplog.messages


def test_a_model_that_reads_more_of_captions_is_known_as_another(pipeline_folder: Path):
    found = {model_digest(load_stable_diffusion(str(pipeline_folder), prompt_chunks=number)) for number in (1, 2, 3)}
    assert len(found) == 3


# ---- caches and training -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos whose captions are those of `CHUNKS`, none of them empty."""
    folder = tmp_path_factory.mktemp("shards")
    captions = [caption for caption in CHUNKS if caption]
    records = [
        Record(f"{split}{n}", noise_jpeg(n), (captions[n % 4], captions[(n + 1) % 4]), split)
        for split, samples in (("train", 8), ("val", 4))
        for n in range(samples)
    ]
    write_shards(records, folder, name="photos", settings=ShardSettings(samples_per_shard=8), workers=1)
    return folder


@pytest.fixture(scope="module")
def cache_of_three(shards: Path, pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their latents, with embeddings of three chunks."""
    model = load_stable_diffusion(str(pipeline_folder), prompt_chunks=3)
    output = tmp_path_factory.mktemp("latents")
    settings = CacheSettings(flips=True, dtype="float32")
    key = cache_key(model, 32, None)
    cache_latents(
        find_shards(str(shards)), output, images=str(shards), model=model, key=key, settings=settings, workers=1
    )
    return output


def losses(model: StableDiffusion, source: Path) -> Iterator[Tensor]:
    """Of each training and validation sample, with an adapter that hears the captions."""
    module = LoraFinetuning(model, lora=LoraSettings(rank=4, alpha=4), optimizer=torch.optim.SGD)
    randomise(module, seed=7)
    data = small_batches(source, caption_dropout=0.5, crop="center")
    for batch in (*data.train_dataloader(), *data.val_dataloader()):
        yield module._batch_losses(batch, "finetuned")


def test_training_on_cached_chunks_is_that_on_images(shards: Path, cache_of_three: Path, pipeline_folder: Path):
    read, cached, cut = (
        torch.cat(list(losses(load_stable_diffusion(str(pipeline_folder), prompt_chunks=number), source)))
        for number, source in ((3, shards), (3, cache_of_three), (1, shards))
    )
    torch.testing.assert_close(cached, read, rtol=4 * 2**-11, atol=0)  # what float16 keeps
    assert not torch.allclose(cut, read, rtol=4 * 2**-11)


@pytest.mark.parametrize("number", [1, 2])
def test_a_cache_of_other_chunks_is_refused(cache_of_three: Path, pipeline_folder: Path, number: int):
    cache = small_batches(cache_of_three).cache
    cache.check(cache_key(load_stable_diffusion(str(pipeline_folder), prompt_chunks=3), 32, None))
    key = cache_key(load_stable_diffusion(str(pipeline_folder), prompt_chunks=number), 32, None)
    with pytest.raises(UserError, match=r"tokenizer: the cache has \w+ in 3 chunks, this run [^\n]+\n.*prompt_chunks"):
        cache.check(key)


def test_preparing_counts_what_was_cut_and_a_run_takes_the_chunks_from_its_config(
    shards: Path, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    model = ("model=sd15", f"model.path={pipeline_folder}", "model.prompt_chunks=2", "data.resolution=32")
    cached = ("data=folder", f"data.source={shards}", "data.buckets=false", "cache=latents", "cache.dtype=float32")
    in_process("lcm_lightning.prepare.commands", *cached, *model, "cache.accelerator=cpu", "cache.output=latents")
    lines = capsys.readouterr().out.splitlines()
    (counted,) = (line for line in lines if " captions were cut " in line)
    assert counted.startswith("18 captions were cut at the end of a word, to at most 2 x 14 tokens; shorten them, or")
    ready = next(line for line in lines if line.startswith("Ready: "))
    assert "model.prompt_chunks=2" in ready
    options = (
        "experiment=lora_flickr8k",
        "data=folder",
        "data.source=latents",
        "debug=fdr",
        "logger=csv",
        "max_steps=1",
    )
    in_process("lcm_lightning.train", *options, *SMALL, *model, "hydra.run.dir=run")
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    drawing = ("run=run", f"prompt={list(CHUNKS)[-1]}", "steps=1", "num_images=1", "output=out", "accelerator=cpu")
    in_process("lcm_lightning.generate", *drawing)
    assert list((tmp_path / "out").rglob("*.png"))
