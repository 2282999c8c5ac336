"""`python -m lcm_lightning.generate` beyond one LoRA from noise: the pictures are those of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    TCDScheduler,
)
from PIL import ExifTags, Image

from helpers.commands import in_process
from lcm_lightning.errors import UserError
from lcm_lightning.generate import fit_photo, write_pictures
from lcm_lightning.methods.lcm_lora import LCM, LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.models.adapters import LoraSettings, add_lora, lora_parameters, lora_state_dict
from lcm_lightning.models.kinds import BASE, usual_kind
from lcm_lightning.models.lora_files import save_lora
from lcm_lightning.models.sampling import DDIM, DPMPP, InitialImage, Sampler, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.runs.contents import Adapter, write_manifest

TCD = Sampler("tcd", "TCD", "TCDScheduler", {"eta": 0.3})
PIXEL = 1e-5  # of images in [0, 1]
LEVEL = 1  # of 255: both sides round float32 images that differ by 1e-5 at most


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Path:
    """A folder with a distillation's run, `student`, and `style.safetensors` on other layers and of another rank."""
    folder = tmp_path_factory.mktemp("loras")
    shapes = {"student/lora/pytorch_lora_weights": (4, "lcm_lora", 0.1), "style": (2, "attention", 0.7)}
    for seed, (name, (rank, layers, std)) in enumerate(shapes.items()):
        model = load_stable_diffusion(str(pipeline_folder))
        add_lora(model.unet, "x", LoraSettings(rank=rank, alpha=2, target_modules=layers))
        generator = torch.Generator().manual_seed(seed)
        for parameter in lora_parameters(model.unet, "x"):
            parameter.data.normal_(0, std, generator=generator)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_lora(lora_state_dict(model.unet, "x"), folder / f"{name}.safetensors")
    write_manifest(folder / "student" / "lora", [Adapter(LcmLoraDistillation.kind)])
    return folder


@pytest.fixture
def drawn(tmp_path: Path, pipeline_folder: Path) -> Callable[..., np.ndarray]:
    """Levels [H, W, 3] of the picture that `generate` draws of a dog, with seed 3."""

    def draw(*options: str) -> np.ndarray:
        where = ("model=sd15", f"model.path={pipeline_folder}", "accelerator=cpu", "dtype=float32")
        what = ("prompt=dog", "num_images=1", "seed=3", f"output={tmp_path}")
        in_process("lcm_lightning.generate", *where, *what, *options)
        return np.asarray(Image.open(tmp_path / "dog-3.png"), dtype=int)

    return draw


def difference(a: np.ndarray, b: np.ndarray) -> int:
    """Largest, in levels of 255."""
    return int(np.abs(a - b).max())


def test_loras_draw_together_by_their_weights_as_in_diffusers(drawn, loras: Path, pipeline_folder: Path):
    student, style = loras / "student", loras / "style.safetensors"
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(student / "lora", adapter_name="student")
    pipeline.load_lora_weights(style, adapter_name="style")

    def expected(names: list[str], weights: list[float]) -> np.ndarray:
        pipeline.set_adapters(names, weights)
        generator = torch.Generator().manual_seed(3)
        settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": generator}
        return np.asarray(pipeline("dog", **settings).images[0], dtype=int)

    both = drawn(f"lora=[{student},{style}]", "weights=[1,-0.8]", "lora_role=finetuned")
    assert difference(both, expected(["student", "style"], [1, -0.8])) <= LEVEL
    assert difference(both, drawn(f"lora=[{student},{style}]", "lora_role=finetuned")) > 2 * LEVEL
    turned = drawn(f"lora=[{style},{student}]", "weights=[-0.8,1]", "lora_role=[finetuned,null]")
    assert difference(both, turned) <= LEVEL
    half = drawn(f"lora={student}", "weights=0.5")
    assert difference(half, expected(["student"], [0.5])) <= LEVEL
    assert difference(half, drawn(f"lora={student}")) > 2 * LEVEL


def test_a_picture_s_file_says_how_it_was_drawn(drawn, loras: Path, pipeline_folder: Path, tmp_path: Path):
    drawn(f"lora={loras / 'student'}", "steps=2")
    with Image.open(tmp_path / "dog-3.png") as file:
        assert file.info["parameters"] == (
            f"dog\nSteps: 2, Sampler: LCM, CFG scale: 1.0, Size: 32x32, Model: {pipeline_folder.name}, "
            'LoRAs: "student: lcm 1", Seed: 3'
        )


def test_a_picture_s_file_says_weights_and_the_photo_it_was_drawn_from(drawn, loras: Path, tmp_path: Path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photo.jpg")
    drawn(f"lora={loras / 'student'}", "weights=0.5", f"init_image={tmp_path}/photo.jpg", "strength=0.75")
    with Image.open(tmp_path / "dog-3.png") as file:
        assert 'LoRAs: "student: lcm 0.5", Denoising strength: 0.75, Init image: photo.jpg' in file.info["parameters"]


def test_a_picture_that_cannot_be_written_leaves_the_one_before_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "dog.png").write_bytes(b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lcm_lightning.output.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_pictures({"dog.png": Image.new("RGB", (8, 8))}, {}, tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_the_student_among_adapters_says_how_they_are_drawn_from():
    student, style = LcmLoraDistillation.kind, LoraFinetuning.kind
    assert usual_kind([student, style], 7.5) is usual_kind([style, student], 7.5) is student
    assert usual_kind([style], 7.5) is style and usual_kind([], 7.5) == BASE


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize(
    ("sampler", "scheduler", "spacing", "steps", "guidance_scale"),
    [
        (DDIM, DDIMScheduler, "leading", 5, 7.5),
        (DPMPP, DPMSolverMultistepScheduler, "linspace", 5, 7.5),
        (LCM, LCMScheduler, "leading", 4, 1.0),
        (TCD, TCDScheduler, "leading", 4, 1.0),
    ],
    ids=["ddim", "dpmpp", "lcm", "tcd"],
)
def test_images_from_a_photo_are_those_of_diffusers(
    pipeline_folder: Path, tiny_model: StableDiffusion, sampler, scheduler, spacing, steps, guidance_scale, strength
):
    photo = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": guidance_scale, "strength": strength, "eta": sampler.settings.get("eta", 0.0)}
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    images = {"image": torch.stack([photo / 2 + 0.5] * 2), "generator": generators, "output_type": "pt"}
    expected = pipeline(["a dog", "a cat"], num_inference_steps=steps, **settings, **images).images
    found = sample(
        tiny_model,
        ["a dog", "a cat"],
        seeds=[3, 4],
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        init_image=InitialImage(photo, strength),
    )
    assert found.shape == (2, 3, 32, 48) and not torch.allclose(found[0], found[1], atol=100 * PIXEL)
    torch.testing.assert_close(found, expected, atol=PIXEL, rtol=0)


def test_a_photo_is_drawn_upright_in_its_own_size(drawn, loras: Path, pipeline_folder: Path, tmp_path: Path):
    """A camera held sideways: 51 x 35 pixels stand as 35 x 51, of which the model takes 32 x 48 from the middle."""
    upright = Image.effect_noise((35, 51), 90).convert("RGB")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=turned)
    found = drawn(f"lora={loras / 'student'}", f"init_image={tmp_path / 'photo.png'}", "strength=0.5")

    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(loras / "student" / "lora")
    photo = upright.crop((1, 1, 33, 49))
    settings = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 1.0}
    expected = pipeline("dog", image=photo, generator=torch.Generator().manual_seed(3), **settings).images[0]
    assert found.shape == (48, 32, 3)
    assert difference(found, np.asarray(expected, dtype=int)) <= LEVEL


@pytest.mark.parametrize(
    ("size", "resolution", "fitted"),
    [
        ((64, 33), None, (64, 32)),
        ((300, 200), 32, (48, 32)),
        ((20, 30), 64, (64, 96)),
        ((65, 64), None, "65x64 pixels, more than 4 times as many as 32x32; set resolution=32"),
        ((200, 40), 32, "200x40 pixels, more than 4 times as many as 32x32; crop it"),
        ((40, 7), None, "40x7 pixels, and the model takes at least 8x8; set resolution=32"),
    ],
)
def test_sizes_that_a_model_takes_and_refuses(tiny_model: StableDiffusion, size, resolution, fitted):
    photo = Image.new("RGB", size)
    if isinstance(fitted, tuple):
        assert fit_photo(photo, tiny_model, resolution, "a.png").size == fitted
    else:
        with pytest.raises(UserError, match=f"init_image=a.png: {fitted}"):
            fit_photo(photo, tiny_model, resolution, "a.png")


def test_the_least_strength_that_is_named_takes_a_step():
    image = torch.zeros(3, 32, 32)
    for steps in range(1, 1001):
        if steps > 1:
            with pytest.raises(UserError, match="takes none of steps") as refused:
                InitialImage(image, 0.999 / steps).skipped(steps)
            least = float(str(refused.value).rpartition(" ")[2])
            assert InitialImage(image, least).skipped(steps) < steps
    for strength in (0, -1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"strength=.*: expected above 0"):
            InitialImage(image, strength)


def test_an_image_and_a_resolution_are_one_too_many(tiny_model: StableDiffusion):
    settings = {"seeds": [0], "steps": 2, "guidance_scale": 1.0, "sampler": LCM}
    with pytest.raises(ValueError, match="leave resolution out"):
        sample(tiny_model, ["a"], **settings, resolution=32, init_image=InitialImage(torch.zeros(3, 32, 32)))
    with pytest.raises(UserError, match="resolution=33"):
        sample(tiny_model, ["a"], **settings, init_image=InitialImage(torch.zeros(3, 32, 33)))
