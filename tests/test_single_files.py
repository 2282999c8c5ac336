"""Models in one file as people share them: each loads as its folder does, or is refused with a remedy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.commands import SMALL, in_process
from helpers.pipelines import TINY_VAE, build_tiny_sdxl
from helpers.single_files import TINY, averaged, build_pipeline, checkpoint, save, unet_tensors
from lcm_lightning import inspect
from lcm_lightning.errors import UserError, short
from lcm_lightning.models import single_file
from lcm_lightning.models.architectures import SD1, SD2, Architecture, clip_tokenizer
from lcm_lightning.models.identity import encoder_key
from lcm_lightning.models.pipeline_files import open_folder
from lcm_lightning.models.sampling import DDIM, sample
from lcm_lightning.models.single_file import ema_layer, open_single_file
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
XL_LAYER = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"  # that diffusers knows SDXL by
CAN_RUN_CODE = r"a \.{} can run code when it is read.*from_single_file.*save_pretrained"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are of tiny networks in the classes of both versions; no hub."""
    monkeypatch.setattr(single_file, "ARCHITECTURES", TINY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@cache
def pipeline(kind: str) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    return build_tiny_sdxl() if kind == "xl_base" else build_pipeline(TINY[kind])


def without(*prefixes: str) -> Change:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(prefixes)}


def only(prefix: str, cut: str = "") -> Change:
    """One network alone, without the beginning of its names."""
    return lambda tensors: {key.removeprefix(cut): v for key, v in tensors.items() if key.startswith(prefix)}


def added(**tensors: Tensor) -> Change:
    """Further tensors; `__` stands for a dot."""
    return lambda given: given | {key.replace("__", "."): tensor for key, tensor in tensors.items()}


def replaced(key: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors | {key: tensor}


def of_type(dtype: torch.dtype) -> Change:
    return lambda tensors: {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def with_average(tensors: Tensors) -> Tensors:
    """Moving averages beside the weights, and what else a training leaves."""
    others = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7), "betas": torch.ones(9)}
    return tensors | {key: tensor + 1 for key, tensor in averaged(tensors).items()} | others


def average_alone(tensors: Tensors) -> Tensors:
    return without(UNET)(tensors) | averaged(tensors)


# The version, what is changed of its file, what is said beside, and what the UNet predicts then.
LOADED: dict[str, tuple[str, Change, dict, str]] = {
    "version 1": ("v1", lambda tensors: tensors, {}, "epsilon"),
    "version 1, pruned to half precision": ("v1", of_type(torch.float16), {}, "epsilon"),
    "version 1 in bfloat16": ("v1", of_type(torch.bfloat16), {}, "epsilon"),
    "version 1 with moving averages beside": ("v1", with_average, {}, "epsilon"),
    "version 1, its moving averages alone": ("v1", average_alone, {}, "epsilon"),
    "version 1 without text_model in its names": ("v1", renamed("text_model.", ""), {}, "epsilon"),
    "version 1 trained on to predict velocity": ("v1", added(v_pred=torch.zeros(0)), {}, "v_prediction"),
    "version 2 by a setting": ("v2", lambda tensors: tensors, {"prediction_type": "v_prediction"}, "v_prediction"),
    "version 2, a base model": ("v2", of_type(torch.float16), {"prediction_type": "epsilon"}, "epsilon"),
    "version 2 by its header": ("v2", lambda t: t, {"modelspec.prediction_type": "v"}, "v_prediction"),
    "version 2 by the header of a base model": ("v2", lambda t: t, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    "version 2, its moving averages alone": ("v2", average_alone, {"prediction_type": "epsilon"}, "epsilon"),
    "SDXL": ("xl_base", lambda tensors: tensors, {}, "epsilon"),
    "SDXL, pruned to half precision": ("xl_base", of_type(torch.float16), {}, "epsilon"),
    "SDXL without text_model in its names": ("xl_base", renamed("text_model.", ""), {}, "epsilon"),
    "SDXL trained on to predict velocity": ("xl_base", added(v_pred=torch.zeros(0)), {}, "v_prediction"),
}

# What is changed of a file of version 1 or 2, and what is said of it.
REFUSED: dict[str, tuple[str, Change, str]] = {
    "inpainting": (
        "v1",
        replaced(FIRST, torch.zeros(32, 9, 3, 3)),
        "is Stable Diffusion 1 for inpainting, which is not supported; give a text-to-image",
    ),
    "inpainting by version 2": (
        "v2",
        replaced(FIRST, torch.zeros(32, 9, 3, 3)),
        "is Stable Diffusion 2 for inpainting, which",
    ),
    "editing": ("v1", replaced(FIRST, torch.zeros(32, 8, 3, 3)), "is InstructPix2Pix, which edits.*give a text-to-"),
    "depth": ("v1", replaced(FIRST, torch.zeros(32, 5, 3, 3)), "5 channels in, expected 4.*give a text-to-image"),
    "a full LCM": (
        "v1",
        added(model__diffusion_model__time_embed__cond_proj__weight=torch.zeros(32, 256)),
        "told more than timestep and caption .*as a full LCM's.*give the checkpoint it was made from",
    ),
    "SDXL's UNet and VAE alone": (
        "xl_base",
        lambda tensors: {
            key: torch.zeros(64, 2048) if key.endswith("attn2.to_k.weight") else tensor
            for key, tensor in without("conditioner.")(tensors).items()
        },
        "its cross-attention is 2048 wide, expected 80 of SDXL; give a complete checkpoint",
    ),
    "SDXL without its first text encoder": (
        "xl_base",
        without("conditioner.embedders.0."),
        r"has no text encoder \(conditioner\.embedders\.0\..*; give a complete",
    ),
    "SDXL without VAE": ("xl_base", without(VAE), r"has no VAE .*give the one it was made for as model\.vae, such as"),
    "SDXL's second text encoder cut short": (
        "xl_base",
        without("conditioner.embedders.1.model.text_projection"),
        "weights of text_encoder_2 lack 1 tensors, first text_projection.weight; download it again",
    ),
    "SDXL for inpainting": (
        "xl_base",
        lambda tensors: tensors | {FIRST: torch.zeros(32, 9, 3, 3), XL_LAYER: torch.zeros(48)},
        "is Stable Diffusion XL for inpainting, which is not supported; give a text-to-image",
    ),
    "Playground 2.5": ("xl_base", added(edm_mean=torch.zeros(4), edm_std=torch.ones(4)), "is Playground 2.5, which"),
    "a full LCM of SDXL": (
        "xl_base",
        added(model__diffusion_model__time_embed__cond_proj__weight=torch.zeros(32, 256)),
        "told more than timestep and caption .*as a full LCM's.*give the checkpoint it was made from",
    ),
    "SDXL's refiner": (
        "v1",
        lambda tensors: {
            "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1280),
            FIRST: torch.zeros(384, 4, 3, 3),
        },
        "is the refiner of Stable Diffusion XL, which",
    ),
    "Stable Diffusion 3": (
        "v1",
        lambda tensors: {
            f"{UNET}joint_blocks.0.context_block.adaLN_modulation.1.bias": torch.zeros(9216),
            f"{UNET}pos_embed": torch.zeros(1, 36864, 2),
        },
        "is Stable Diffusion 3, which",
    ),
    "Flux": (
        "v1",
        lambda tensors: {"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(128)},
        "is a model of the kind flux-schnell, which",
    ),
    "a LoRA": (
        "v1",
        lambda tensors: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 64)},
        "is a LoRA; give it as lora=",
    ),
    "a UNet of a diffusers folder": (
        "v1",
        lambda tensors: dict(pipeline("v1").unet.state_dict()),
        "has no UNet .*first key is conv_in.bias; give the diffusers folder that it is a part of",
    ),
    "a VAE alone": ("v1", only(VAE, cut=VAE), "has no UNet .*first key is decoder.*; give a complete"),
    "nothing": ("v1", lambda tensors: {}, "has no UNet .*first key is none; give a complete"),
    "no VAE": ("v1", without(VAE), r"has no VAE .*give the one it was made for as model\.vae, such as"),
    "no text encoder": ("v1", without(TEXT), "has no text encoder .*give a complete"),
    "text of another width": ("v1", renamed("attn2.to_k", "x"), "its cross-attention is None wide, expected 32 of"),
    "version 2 that does not tell": ("v2", lambda tensors: tensors, "give model.prediction_type=v_prediction .*or eps"),
    "a UNet cut short": ("v1", without(f"{UNET}out."), "weights of unet are missing; download it again, or give"),
    "a VAE cut short": ("v1", without(f"{VAE}encoder.conv_in"), "weights of vae are missing; download it again"),
    "a text encoder cut short": (
        "v1",
        without(f"{TEXT}transformer.text_model.final"),
        "weights of text_encoder lack 2 tensors, first final_layer_norm.bias; download it again",
    ),
    "NaN": ("v1", replaced(FIRST, torch.full((32, 4, 3, 3), float("nan"))), "weights of unet are not finite .*again"),
    "quantised": (
        "v1",
        replaced(FIRST, torch.zeros(32, 4, 3, 3, dtype=torch.int8)),
        "unet is quantised .*is of type I8.*give its weights in float16",
    ),
    "text of another size": (
        "v1",
        replaced(f"{TEXT}transformer.text_model.embeddings.token_embedding.weight", torch.zeros(600, 32)),
        "cannot be loaded: text_encoder .*download it again",
    ),
}


def written(kind: str, change: Change, folder: Path, **metadata: str) -> Path:
    return save(change(checkpoint(pipeline(kind))), folder / "model.safetensors", **metadata)


def assert_equal(model: StableDiffusion, expected: StableDiffusionPipeline, dtype: torch.dtype = torch.float32) -> None:
    """The same bits in all networks, in `dtype` as in the file."""
    second = ["text_encoder_2"] * hasattr(expected, "text_encoder_2")
    for name in ("unet", "vae", "text_encoder", *second):
        found, wanted = getattr(model, name).state_dict(), getattr(expected, name).state_dict()
        assert found.keys() == wanted.keys()
        assert [key for key in found if not torch.equal(found[key], wanted[key].to(dtype).to(found[key].dtype))] == []


@pytest.mark.parametrize("case", LOADED)
def test_a_single_file_has_the_bits_of_the_pipeline_it_was_made_of(case: str, tmp_path: Path):
    kind, change, said, predicts = LOADED[case]
    settings = {key: value for key, value in said.items() if key == "prediction_type"}
    file = written(kind, change, tmp_path, **{key: value for key, value in said.items() if key not in settings})
    model = load_stable_diffusion(str(file), **settings)
    half = next((dtype for dtype in (torch.float16, torch.bfloat16) if change(ONE)["x"].dtype == dtype), torch.float32)
    assert_equal(model, pipeline(kind), half)
    assert model.prediction_type == predicts
    assert model.unet.config.attention_head_dim == pipeline(kind).unet.config.attention_head_dim
    assert model.default_resolution == (384 if (kind, predicts) == ("v2", "v_prediction") else 32)


ONE = {"x": torch.ones(1), FIRST: torch.ones(1)}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unfit_single_file_is_refused_in_one_sentence(case: str, tmp_path: Path):
    kind, change, expected = REFUSED[case]
    file = written(kind, change, tmp_path)
    settings = {"prediction_type": "epsilon"} if kind == "v2" and "tell" not in case else {}
    with pytest.raises(UserError) as raised:
        load_stable_diffusion(str(file), **settings)
    message = str(raised.value)
    assert message.startswith("model.path=") and re.search(expected, message), message
    assert "\n" not in message and len(message.replace(short(file, 80), "M")) <= 300


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("v1-5.ckpt", b"", CAN_RUN_CODE.format("ckpt")),
        ("v1-5.pt", b"", CAN_RUN_CODE.format("pt")),
        ("v1-5.safetensors", b"", r"cannot be loaded: v1-5\.safetensors .*download it again"),
        ("v1-5.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "cannot be loaded.*download it again"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, monkeypatch, name: str, content: bytes, expected: str):
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, Path(name)):
        with pytest.raises(UserError, match=expected):
            load_stable_diffusion(str(path))


def test_a_file_that_is_not_there_is_taken_for_no_hub_id():
    with pytest.raises(UserError, match=r"model\.path=models/dream\.safetensors: no such folder or file; give a diff"):
        load_stable_diffusion("models/dream.safetensors")


@pytest.mark.parametrize(
    ("line", "predicts"), [('    parameterization: "v"\n', "v_prediction"), ("    linear_start: 0.00085\n", "epsilon")]
)
def test_the_settings_that_lie_beside_a_file_say_what_it_predicts(tmp_path: Path, line: str, predicts: str):
    file = written("v2", lambda tensors: tensors, tmp_path)
    file.with_suffix(".yaml").write_text(f"model:\n  params:\n{line}")
    assert load_stable_diffusion(str(file)).prediction_type == predicts


def test_a_schedule_that_ends_without_signal_is_known_by_its_mark(tmp_path: Path):
    marks = added(v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    model = load_stable_diffusion(str(written("v1", marks, tmp_path)))
    assert model.alphas_cumprod()[-1] == 0
    with pytest.raises(UserError, match="zero terminal SNR with prediction_type=epsilon"):
        load_stable_diffusion(model.name_or_path, prediction_type="epsilon")


# ---- another VAE -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One VAE as people have it."""
    folder = tmp_path_factory.mktemp("vaes")
    torch.manual_seed(1)
    other = AutoencoderKL(**TINY_VAE)
    other.save_pretrained(folder / "folder")
    other.save_pretrained(folder / "pipeline" / "vae")
    other.save_pretrained(folder / "half", variant="fp16")
    whole = build_pipeline(TINY["v1"])
    whole.vae = other
    save(checkpoint(whole), folder / "checkpoint.safetensors")
    save(only(VAE, cut=VAE)(checkpoint(whole)), folder / "original.safetensors")
    shutil.copy(folder / "folder" / "diffusion_pytorch_model.safetensors", folder / "network.safetensors")
    AutoencoderKL(**{**TINY_VAE, "latent_channels": 16}).save_pretrained(folder / "other_latents")
    AutoencoderKL(**{**TINY_VAE, "scaling_factor": 0.13025}).save_pretrained(folder / "other_scale")
    UNet2DConditionModel(**TINY["v1"].unet).save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize(
    "place",
    ["folder", "pipeline", "half", "checkpoint.safetensors", "original.safetensors", "network.safetensors"],
)
@pytest.mark.parametrize("own", ["none", "folder"])
def test_another_vae_takes_the_place_of_the_model_s_own(vaes: Path, tmp_path: Path, place: str, own: str):
    model_path = written("v1", without(VAE), tmp_path)
    if own == "folder":
        model_path = tmp_path / "model"
        pipeline("v1").save_pretrained(model_path)
    model = load_stable_diffusion(str(model_path), vae=str(vaes / place), defer_encoders=True)
    expected = load_file(vaes / "folder" / "diffusion_pytorch_model.safetensors")
    model.load_encoders()
    found = model.vae.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert (
        encoder_key(model)["vae"]
        == encoder_key(load_stable_diffusion(str(model_path), vae=str(vaes / "folder")))["vae"]
    )


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("nowhere", "no such file or folder; give a folder, hub id or .safetensors file"),
        ("unet", "is of class UNet2DConditionModel, expected AutoencoderKL; give"),
        ("other_latents", "its latents have 16 channels, the UNet's 4; give one for these"),
        ("other_scale", "its scaling_factor is 0.13025, that of the model's own 0.18215: .*; give one"),
        ("vae.pt", CAN_RUN_CODE.format("pt")),
        ("lora.safetensors", "holds no VAE, its first key is x.lora_A.weight; give one"),
    ],
)
def test_an_unfit_vae_is_refused(vaes: Path, tmp_path: Path, place: str, expected: str):
    (vaes / "vae.pt").write_bytes(b"")
    save_file({"x.lora_A.weight": torch.zeros(1)}, vaes / "lora.safetensors")
    with pytest.raises(UserError, match=rf"^model\.vae=.*{place}: {expected}"):
        load_stable_diffusion(str(written("v1", without(VAE), tmp_path)), vae=str(vaes / place))


# ---- what ships ------------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_single_files_is_clip_s():
    """Ids that OpenAI's README and OpenCLIP's tests print."""
    tokenizer = clip_tokenizer("<|endoftext|>")
    ids = tokenizer(["a diagram", "a dog", "a cat"]).input_ids
    assert ids == [[49406, 320, 22697, 49407], [49406, 320, 1929, 49407], [49406, 320, 2368, 49407]]
    assert len(tokenizer.get_vocab()) == 49408
    padded = {pad: clip_tokenizer(pad)("a cat", padding="max_length").input_ids for pad in ("<|endoftext|>", "!")}
    assert padded["<|endoftext|>"][3:] == [49407] * 74 and padded["!"][3:] == [49407, *[0] * 73]


@pytest.mark.parametrize("architecture", [SD1, SD2], ids=lambda architecture: architecture.title)
def test_every_weight_is_known_by_the_name_of_its_moving_average(architecture: Architecture):
    with torch.device("meta"):
        names = unet_tensors(UNet2DConditionModel(**architecture.unet)).keys()
    assert all(ema_layer(name.removeprefix(UNET).replace(".", "")) == name.removeprefix(UNET) for name in names)


def seeded(architecture: Architecture, dtype: torch.dtype) -> StableDiffusionPipeline:
    """A pipeline of `architecture` with cheap weights that all differ."""
    with torch.device("meta"):
        whole = build_pipeline(architecture)
    for number, network in enumerate((whole.unet, whole.vae, whole.text_encoder)):
        network.to(dtype).to_empty(device="cpu")
        for place, weight in enumerate(network.parameters()):
            weight.data.copy_((torch.arange(weight.numel()) % 997 + place + number).view(weight.shape) / 1024)
    return whole


@pytest.mark.slow
@pytest.mark.thorough
def test_stable_diffusion_1_5_has_the_same_bits_from_a_single_file_as_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(single_file, "ARCHITECTURES", {"v1": SD1, "v2": SD2})
    whole = seeded(SD1, torch.float16)
    save_file({k: v.contiguous() for k, v in checkpoint(whole).items()}, tmp_path / "v1-5.safetensors")
    whole.save_pretrained(tmp_path / "folder")
    del whole
    file, folder = (
        open_single_file(tmp_path / "v1-5.safetensors", None, other_vae=False),
        open_folder(tmp_path / "folder"),
    )
    for name in ("unet", "vae", "text_encoder"):
        for (key, found), (other_key, expected) in zip(weights(file, name), weights(folder, name), strict=True):
            assert key == other_key and torch.equal(found, expected), key
    caption = "a dog's café!"
    (ids,) = {tuple(files.tokenizers["tokenizer"](caption).input_ids) for files in (file, folder)}
    assert len(ids) > 2


def weights(files, name: str) -> Iterator[tuple[str, Tensor]]:
    yield from sorted(files.networks[name].read(torch.float16).state_dict().items())


# ---- in every command ------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of version 1 in the working folder."""
    monkeypatch.chdir(tmp_path)
    return written("v1", of_type(torch.float16), tmp_path)


@pytest.mark.parametrize("kind", ["v1", "xl_base"])
def test_pictures_of_a_file_are_those_of_its_folder(kind: str, tmp_path: Path):
    half = build_tiny_sdxl() if kind == "xl_base" else build_pipeline(TINY[kind])
    half.to(torch.float16).save_pretrained(tmp_path / "folder")
    file = written(kind, of_type(torch.float16), tmp_path)
    one, other = (load_stable_diffusion(str(place)) for place in (file, tmp_path / "folder"))
    pictures = [
        sample(model, ["a dog"], seeds=[0], steps=2, guidance_scale=1.0, sampler=DDIM, resolution=32)
        for model in (one, other)
    ]
    assert torch.equal(*pictures)
    assert encoder_key(one) == encoder_key(other)


def test_a_file_is_trained_drawn_from_and_cached_as_a_folder(file: Path, tmp_path: Path, flickr_shards: Path):
    model = ("model=sd15", f"model.path={file.name}", "model.channels_last=false")
    data = f"data.source={flickr_shards}"
    small = (*SMALL, "debug=fdr", "logger=csv", "callbacks.samples=null")
    in_process("train", "experiment=lora_flickr8k", *model, data, "hydra.run.dir=style", *small)
    teacher = "method.teacher_lora=style"
    in_process("train", "experiment=lcm_flickr8k", *model, data, teacher, "hydra.run.dir=student", *small)
    assert (tmp_path / "student" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    drawing = ("accelerator=cpu", "dtype=float32", "prompt=dog", "num_images=1", "output=drawn")
    in_process("lcm_lightning.generate", "run=student", *drawing)
    in_process("lcm_lightning.generate", *model, "lora=style", "lora_role=finetuned", "steps=2", *drawing)
    assert list((tmp_path / "drawn").glob("*.png"))
    latents = ("cache=latents", "cache.accelerator=cpu", "data.resolution=32", "cache.output=latents")
    in_process("lcm_lightning.prepare.commands", "data=flickr8k", data, *model, *latents)
    in_process("train", "experiment=lcm_flickr8k", *model, "data.source=latents", "hydra.run.dir=cached", *small)


def test_inspect_says_what_a_file_is_and_why_it_is_refused(file: Path, tmp_path: Path):
    ((title, rows),) = inspect.describe(file)
    assert title == str(file)
    assert dict(rows)["layout"] == "a checkpoint in one file" and "32 wide" in dict(rows)["base model"]
    assert dict(rows)["unet"].endswith("tensors of F16") and "refused" not in dict(rows)
    save(without(VAE)(checkpoint(pipeline("v1"))), file)
    ((_, rows),) = inspect.describe(file)
    assert dict(rows)["vae"] == "none" and "has no VAE" in dict(rows)["refused"]
    assert inspect.networks_of(file).keys() == {"unet", "text_encoder"}
    of_xl = written("xl_base", lambda tensors: tensors, tmp_path)
    ((_, rows),) = inspect.describe(of_xl)
    assert dict(rows)["text encoder 2"].endswith("tensors of F32") and "refused" not in dict(rows)
    assert inspect.networks_of(of_xl).keys() == {"unet", "text_encoder", "text_encoder_2"}
