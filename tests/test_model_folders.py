"""Model folders as people have them: each loads as meant, or is refused in one sentence with file and remedy."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from helpers.pipelines import TINY_TEXT_LENGTH, build_tiny_pipeline
from lcm_lightning.errors import UserError, short
from lcm_lightning.models.architectures import byte_tokenizer
from lcm_lightning.models.identity import encoder_key
from lcm_lightning.models.sampling import DDIM, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion

Change = Callable[[Path], None]
GONE = object()
UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
SCHEDULE = "scheduler/scheduler_config.json"
UNET_CONFIG, VAE_CONFIG = "unet/config.json", "vae/config.json"


def config(file: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not GONE}))

    return change


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return change


def text(file: str, content: str) -> Change:
    return lambda folder: (folder / file).write_text(content) and None


def renamed(infix: str, *files: str) -> Change:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).rename(folder / file.replace(".safetensors", infix))

    return change


def lacking(file: str, prefix: str) -> Change:
    def change(folder: Path) -> None:
        kept = {key: value for key, value in load_file(folder / file).items() if not key.startswith(prefix)}
        save_file(kept, folder / file, metadata={"format": "pt"})

    return change


def cut(file: str) -> Change:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:5000]) and None


def tokenizer_of(vocabulary: int) -> Change:
    return lambda folder: byte_tokenizer(vocabulary, TINY_TEXT_LENGTH).save_pretrained(folder / "tokenizer") and None


def slow_tokenizer(*names: str) -> Change:
    """As it was saved before transformers 5: `vocab.json` and `merges.txt`; of these `names`."""

    def change(folder: Path) -> None:
        model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
        added = {"<|startoftext|>": 512, "<|endoftext|>": 513}
        contents = {"vocab.json": json.dumps({**model["vocab"], **added}), "merges.txt": "#version: 0.2\n"}
        (folder / "tokenizer" / "tokenizer.json").unlink()
        for name in names:
            (folder / "tokenizer" / name).write_text(contents[name])

    return change


def unet(**settings: object) -> Change:
    """Another UNet of random weights."""

    def change(folder: Path) -> None:
        given = UNet2DConditionModel.load_config(folder / "unet")
        UNet2DConditionModel.from_config({**given, **settings}).save_pretrained(folder / "unet")

    return change


def spoilt(file: str, value: float, *keys: str) -> Change:
    """One number of the first tensors whose names hold one of `keys`."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        for key in keys:
            tensors[next(name for name in tensors if key in name)].view(-1)[-1] = value
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return change


def of_type(file: str, dtype: torch.dtype) -> Change:
    """The weights in another type."""

    def change(folder: Path) -> None:
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / file).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return change


def sharded(file: str, infix: str = "") -> Change:
    """The weights in two files, and an index of them, as diffusers and transformers write what is large."""

    def change(folder: Path) -> None:
        tensors = sorted(load_file(folder / file).items())
        stem = file.removesuffix(".safetensors")
        (folder / file).unlink()
        where = {}
        for number, part in enumerate((tensors[::2], tensors[1::2]), 1):
            shard = folder / f"{stem}{infix}-0000{number}-of-00002.safetensors"
            save_file(dict(part), shard, metadata={"format": "pt"})
            where |= {key: shard.name for key, _ in part}
        index = {"metadata": {"total_size": sum(tensor.nbytes for _, tensor in tensors)}, "weight_map": where}
        (folder / f"{stem}.safetensors.index{infix}.json").write_text(json.dumps(index))

    return change


def prefixed(file: str, prefix: str) -> Change:
    """Every name with `prefix`, once."""

    def change(folder: Path) -> None:
        tensors = {prefix + key.removeprefix(prefix): tensor for key, tensor in load_file(folder / file).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return change


def added(file: str, **tensors: torch.Tensor) -> Change:
    """Further tensors beside the weights."""
    return lambda folder: save_file(load_file(folder / file) | tensors, folder / file, metadata={"format": "pt"})


def vocabulary_of_merges(kept: int) -> Change:
    """`vocab.json` and `merges.txt` of four merged tokens beside the letters, with the first merges alone."""

    def change(folder: Path) -> None:
        slow_tokenizer("vocab.json", "merges.txt")(folder)
        vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
        for merged, letter in (("do", "$"), ("dog</w>", "%"), ("ca", "&"), ("cat</w>", "*")):
            vocabulary[merged] = vocabulary.pop(letter)
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
        merges = ["d o", "do g</w>", "c a", "ca t</w>"][:kept]
        (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")

    return change


def scheduler(name: str, **settings: object) -> Change:
    """Another scheduler of diffusers, as its class saves it."""

    def change(folder: Path) -> None:
        getattr(diffusers, name)(**settings).save_pretrained(folder / "scheduler")
        config("model_index.json", scheduler=["diffusers", name])(folder)

    return change


def both(*changes: Change) -> Change:
    """One after the other."""
    return lambda folder: [change(folder) for change in changes] and None


def tiny_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**blocks).save_pretrained(folder / "vae")


LOADED: dict[str, Change] = {
    "as saved": lambda folder: None,
    "no length of captions": config("tokenizer/tokenizer_config.json", model_max_length=GONE),
    "a length beyond the text encoder's": config("tokenizer/tokenizer_config.json", model_max_length=77),
    "a length of captions that is a text": config("tokenizer/tokenizer_config.json", model_max_length="77"),
    "a vocabulary of longer tokens": vocabulary_of_merges(4),
    "no tokenizer_config": without("tokenizer/tokenizer_config.json"),
    "vocab.json and merges.txt": slow_tokenizer("vocab.json", "merges.txt"),
    "half precision alone": renamed(".fp16.safetensors", UNET, VAE, TEXT),
    "half precision of the UNet alone": renamed(".fp16.safetensors", UNET),
    "half precision beside full": lambda folder: (
        shutil.copy(folder / VAE, folder / "vae" / "x.fp16.safetensors") and None
    ),
    ".bin beside .safetensors": text("unet/diffusion_pytorch_model.bin", ""),
    "a UNet that embeds the whole text": unet(addition_embed_type="text", addition_embed_type_num_heads=4),
    "sample_size as a list": config("unet/config.json", sample_size=[8, 8]),
    "no safety checker in the index": config("model_index.json", safety_checker=GONE, feature_extractor=GONE),
    "a safety checker that is not there": config("model_index.json", safety_checker=["stable_diffusion", "Checker"]),
    "an image encoder that is not there": config("model_index.json", image_encoder=["transformers", "CLIPVision"]),
    "an entry of the index missing": config("model_index.json", unet=GONE, tokenizer=[None, None]),
    "the scheduler's class in its config alone": config("model_index.json", scheduler=GONE),
    "another scheduler": config("model_index.json", scheduler=["diffusers", "PNDMScheduler"]),
    "no sizes of the VAE's": config(VAE_CONFIG, sample_size=GONE),
    "weights of 8 bits": of_type(UNET, torch.float8_e5m2),
    "weights of 64 bits": of_type(UNET, torch.float64),
    "positions kept with the weights": added(TEXT, **{"text_model.embeddings.position_ids": torch.arange(16)[None]}),
    "a text encoder saved by transformers 4": prefixed(TEXT, "text_model."),
    "weights in several files": both(sharded(UNET), sharded(VAE), sharded(TEXT)),
    "weights in several files of half precision": both(sharded(UNET, ".fp16"), sharded(VAE, ".fp16")),
    "velocity": config(SCHEDULE, prediction_type="v_prediction"),
    "velocity on a schedule that ends without signal": config(
        SCHEDULE, prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "no train timesteps": config(SCHEDULE, num_train_timesteps=GONE),
    "few train timesteps": config(SCHEDULE, num_train_timesteps=30),
}

# What is changed, the file or part that the message names, and its remedy.
AGAIN = "copy or download the folder again"
REFUSED: dict[str, tuple[Change, str]] = {
    "no index": (without("model_index.json"), r"no model_index\.json; give a diffusers pipeline folder"),
    "a damaged index": (text("model_index.json", "["), r"model_index\.json is damaged .*download the folder again"),
    "an index that is a list": (text("model_index.json", "[]"), r"model_index\.json is damaged .*again"),
    "an inpainting pipeline": (
        config("model_index.json", _class_name="StableDiffusionInpaintPipeline"),
        "is a StableDiffusionInpaintPipeline; only StableDiffusionPipeline",
    ),
    "no vocabulary": (without("tokenizer/tokenizer.json"), r"tokenizer holds neither tokenizer\.json nor vocab\.json"),
    "no merges": (slow_tokenizer("vocab.json"), r"tokenizer holds neither tokenizer\.json nor merges\.txt, .*again"),
    "no tokenizer": (without("tokenizer"), rf"tokenizer holds neither .*{AGAIN}"),
    "a damaged tokenizer": (text("tokenizer/tokenizer.json", "{"), rf"cannot be loaded: tokenizer .*{AGAIN}"),
    "a tokenizer of a larger vocabulary": (
        tokenizer_of(49408),
        r"tokenizer knows 49408 tokens, the text encoder 514 .*give it the tokenizer",
    ),
    "a tokenizer of a smaller vocabulary": (
        config("text_encoder/config.json", vocab_size=49408),
        r"tokenizer knows 514 tokens, the text encoder 49408 \(vocab_size\)",
    ),
    "no UNet": (without("unet"), rf"no unet/config\.json; {AGAIN}"),
    "no VAE": (without("vae"), rf"no vae/config\.json; {AGAIN}"),
    "no text encoder": (without("text_encoder"), rf"no text_encoder/config\.json; {AGAIN}"),
    "no scheduler": (without("scheduler"), rf"cannot be loaded: scheduler/scheduler_config\.json .*{AGAIN}"),
    "no weights of the UNet": (without(UNET), rf"unet has no diffusion_pytorch_model\.safetensors; {AGAIN}"),
    "no weights of the text encoder": (without(TEXT), rf"text_encoder has no model\.safetensors; {AGAIN}"),
    ".bin alone": (renamed(".bin", UNET, VAE), r"unet has no .*pytorch_model\.bin, which can run code.*convert"),
    ".ckpt alone": (renamed(".ckpt", VAE), r"vae has no .*pytorch_model\.ckpt, which can run code.*convert"),
    "a UNet cut off": (cut(UNET), rf"cannot be loaded: unet .*{AGAIN}"),
    "a VAE cut off": (cut(VAE), rf"cannot be loaded: vae .*{AGAIN}"),
    "a text encoder cut off": (cut(TEXT), rf"cannot be loaded: text_encoder .*{AGAIN}"),
    "a pointer of git-lfs for the UNet": (text(UNET, LFS), rf"cannot be loaded: unet .*{AGAIN}"),
    "a pointer of git-lfs for the text encoder": (text(TEXT, LFS), rf"cannot be loaded: text_encoder .*{AGAIN}"),
    "weights the UNet lacks": (lacking(UNET, "conv_in"), r"weights of unet lack 2 tensors, first conv_in\.bias"),
    "weights the VAE lacks": (
        lacking(VAE, "encoder.conv_in"),
        r"weights of vae lack 2 tensors, first encoder\.conv_in",
    ),
    "weights the text encoder lacks": (lacking(TEXT, "final_layer"), r"weights of text_encoder lack 2 tensors"),
    "a damaged config": (text("unet/config.json", "{"), rf"cannot be loaded: unet/config\.json .*{AGAIN}"),
    "a config that is a list": (text("vae/config.json", "[1]"), r"cannot be loaded: vae/config\.json"),
    "guidance embedded in an odd width": (
        unet(time_cond_proj_dim=15),
        r"unet/config\.json: time_cond_proj_dim=15: .*even",
    ),
    "an inpainting UNet": (unet(in_channels=9), r"unet/config\.json: 9 channels in and 4 out.*VAE has 4.*give a"),
    "an editing UNet": (unet(in_channels=8), r"unet/config\.json: 8 channels in and 4 out"),
    "a UNet that predicts variances": (unet(out_channels=8), r"unet/config\.json: 4 channels in and 8 out"),
    "a UNet of classes": (unet(num_class_embeds=10), r"unet/config\.json: num_class_embeds=10: .*give"),
    "a UNet of SDXL": (
        config("unet/config.json", addition_embed_type="text_time"),
        r"unet/config\.json: addition_embed_type=text_time: .*give",
    ),
    "a UNet of another text encoder": (unet(cross_attention_dim=64), r"cross_attention_dim=64, .*hidden_size=32; take"),
    "another class of UNet": (
        config("unet/config.json", _class_name="UNet2DModel"),
        r"unet/config\.json: is of class UNet2DModel, expected UNet2DConditionModel; give one",
    ),
    "a tiny VAE": (tiny_vae, r"vae/config\.json: is of class AutoencoderTiny.*model\.preview_vae"),
    "a schedule without its length": (
        config(SCHEDULE, num_train_timesteps=None),
        r"cannot be loaded: scheduler/scheduler_config\.json",
    ),
    "an unknown schedule of noise": (
        config(SCHEDULE, beta_schedule="mine"),
        r"scheduler_config\.json \(.*mine",
    ),
    "a class that is no scheduler": (
        config("model_index.json", scheduler=["diffusers", "AutoencoderKL"]),
        r"scheduler_config\.json \(AutoencoderKL is no scheduler",
    ),
    "betas for other timesteps": (
        config(SCHEDULE, trained_betas=[0.1] * 10),
        r"trained_betas has 10 values for 1000 .*give",
    ),
    "betas above 1": (config(SCHEDULE, beta_end=3.0), r"betas are not all above 0 and at most 1; give"),
    "flow matching": (
        scheduler("FlowMatchEulerDiscreteScheduler"),
        r"FlowMatchEulerDiscreteScheduler is for .*give one",
    ),
    "flow matching beneath another class": (
        both(
            scheduler("FlowMatchEulerDiscreteScheduler"),
            config("model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        ),
        r"FlowMatchEulerDiscreteScheduler is for models of another kind",
    ),
    "flow matching by a solver's settings": (
        scheduler("UniPCMultistepScheduler", use_flow_sigmas=True),
        r"UniPCMultistepScheduler is for models of another kind",
    ),
    "sigmas of Karras et al.": (scheduler("EDMEulerScheduler"), r"EDMEulerScheduler is for models of another kind"),
    "consistency models": (
        scheduler("CMStochasticIterativeScheduler"),
        r"CMStochasticIterativeScheduler is for models",
    ),
    "NaN in the UNet": (
        spoilt(UNET, float("nan"), "conv_in"),
        r"weights of unet are not finite .*first conv_in.*again",
    ),
    "infinity in the VAE": (
        spoilt(VAE, float("-inf"), "decoder.conv_out"),
        r"weights of vae are not .*decoder\.conv_out",
    ),
    "NaN in the text encoder": (
        spoilt(TEXT, float("nan"), "layer_norm1.bias"),
        r"weights of text_encoder are not finite",
    ),
    "merges emptied": (vocabulary_of_merges(0), r"no merges for 4 of its 514 tokens, first 'do', .*again"),
    "merges of another tokenizer": (
        both(
            vocabulary_of_merges(4),
            text("tokenizer/merges.txt", "#version: 0.2\na t\n"),
        ),
        rf"cannot be loaded: tokenizer .*{AGAIN}",
    ),
    "a size that is a text": (
        config(UNET_CONFIG, sample_size="16"),
        r"unet/config\.json: sample_size='16': expected whole",
    ),
    "a size of fractions": (config(VAE_CONFIG, sample_size=8.5), r"vae/config\.json: sample_size=8\.5: expected whole"),
    "an empty size": (config(UNET_CONFIG, sample_size=[]), r"unet/config\.json: sample_size=\[\]: expected whole"),
    "a scale of nothing": (config(VAE_CONFIG, scaling_factor=None), r"vae/config\.json: scaling_factor=None: expected"),
    "a scale of zero": (config(VAE_CONFIG, scaling_factor=0), r"vae/config\.json: scaling_factor=0: expected a number"),
    "a shift that is a text": (config(VAE_CONFIG, shift_factor="x"), r"vae/config\.json: shift_factor='x': expected a"),
    "quantised weights": (of_type(UNET, torch.int8), r"unet is quantised .*is of type I8.*give its weights"),
    "a LoRA beside the weights": (
        added(UNET, **{"conv_in.lora_A.default.weight": torch.ones(4, 4, 3, 3)}),
        r"unet has a LoRA beside its weights, first conv_in\.lora_A\.default\.weight.*fuse it",
    ),
    "blocks of nothing": (
        config(VAE_CONFIG, block_out_channels=None),
        r"vae/config\.json: block_out_channels=None: exp",
    ),
    "another prediction": (config(SCHEDULE, prediction_type="flow"), r"prediction_type=flow is none of .*; give a"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build_tiny_pipeline().save_pretrained(folder)
    return folder


def changed(saved: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(saved, folder)
    change(folder)
    return folder


def drawn(model: StableDiffusion) -> torch.Tensor:
    prompts = ["a dog", "two cats"]
    return sample(model, prompts, seeds=[0, 0], steps=2, guidance_scale=1.0, sampler=DDIM, resolution=32)


@pytest.mark.parametrize("case", LOADED)
def test_a_model_folder_loads_as_it_was_meant(case, saved, tmp_path):
    model = load_stable_diffusion(str(changed(saved, tmp_path / "model", LOADED[case])))
    assert model.default_resolution == 32
    images = drawn(model)
    assert (images[0] - images[1]).abs().max() > 1e-4  # it reads its prompts
    if not any(word in case for word in ("timesteps", "embeds", "tokens", "8 bits", "velocity")):
        assert torch.equal(images, drawn(load_stable_diffusion(str(saved))))
    expected = encoder_key(load_stable_diffusion(str(saved)))
    assert {name: encoder_key(model)[name] for name in ("vae", "text_encoder")}.items() <= expected.items()


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("deferred", [False, True])
def test_an_unfit_model_folder_is_refused_in_one_sentence(case, saved, tmp_path, deferred):
    change, expected = REFUSED[case]
    folder = changed(saved, tmp_path / "model", change)
    with pytest.raises(UserError) as raised:
        load_stable_diffusion(str(folder), defer_encoders=deferred).load_encoders()
    message = str(raised.value).replace(short(folder, 80), "M")
    assert re.search(expected, message), message
    assert message.startswith("model.path=M") and len(message) <= 300 and "\n" not in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_beyond_half_precision_are_refused_where_they_are_read_in_it(saved, tmp_path, dtype):
    folder = changed(saved, tmp_path / "model", spoilt(UNET, 1e5, "conv_out.weight"))
    if dtype == torch.bfloat16:
        assert load_stable_diffusion(str(folder), dtype=dtype)
    else:
        with pytest.raises(
            UserError, match=r"weights of unet are not finite in torch\.float16, first conv_out\.weight"
        ):
            load_stable_diffusion(str(folder), dtype=dtype)


def test_what_a_model_predicts_may_be_said_in_place_of_its_config(saved, tmp_path):
    assert load_stable_diffusion(str(saved), prediction_type="v_prediction").prediction_type == "v_prediction"
    zero_snr = changed(saved, tmp_path / "model", config(SCHEDULE, rescale_betas_zero_snr=True))
    with pytest.raises(UserError, match="zero terminal SNR with prediction_type=epsilon"):
        load_stable_diffusion(str(zero_snr))
    assert load_stable_diffusion(str(zero_snr), prediction_type="v_prediction").alphas_cumprod()[-1] == 0


def test_a_long_path_stands_in_the_message_without_its_middle(saved, tmp_path):
    folder = changed(saved, tmp_path / ("folder_of_models" * 12) / "model", without("unet"))
    with pytest.raises(UserError, match=r"model\.path=/.*\.\.\..*/model: cannot be loaded: there is no unet") as raised:
        load_stable_diffusion(str(folder))
    assert len(str(raised.value)) <= 300


def test_a_unet_that_does_not_say_its_size_gets_that_of_stable_diffusion_and_says_so(saved, tmp_path, caplog):
    folder = changed(saved, tmp_path / "model", config("unet/config.json", sample_size=None))
    with caplog.at_level(logging.WARNING):
        model = load_stable_diffusion(str(folder))
    assert model.default_resolution == 64 * model.vae_scale_factor
    assert "unet/config.json has no sample_size: 64" in caplog.text and "data.resolution" in caplog.text


def test_more_steps_than_the_schedule_has_are_refused(saved, tmp_path):
    model = load_stable_diffusion(str(changed(saved, tmp_path / "model", config(SCHEDULE, num_train_timesteps=30))))
    with pytest.raises(UserError, match="steps=50: expected 1 to 30, the model's train timesteps"):
        sample(model, ["a"], seeds=[0], steps=50, guidance_scale=1.0, sampler=DDIM, resolution=32)
