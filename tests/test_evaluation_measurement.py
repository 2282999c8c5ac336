"""From files to figures: what is kept of a drawing, who is held against whom, and what metrics.json says of it."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.contenders import Contender
from lcm_lightning.evaluation.drawing import (
    Drawing,
    ModelImages,
    draw_missing,
    image_file,
    latents_file,
    read_latents,
)
from lcm_lightning.evaluation.features import Clip, ClipPatches
from lcm_lightning.evaluation.frechet import FrechetDistance, frechet_distance, frechet_infinity
from lcm_lightning.evaluation.kernel_distances import kid
from lcm_lightning.evaluation.measurement import COMPARED, MetricSuite, compare, measure, teachers_of
from lcm_lightning.evaluation.metrics import Resampling, estimate
from lcm_lightning.evaluation.model_sources import ModelSource
from lcm_lightning.evaluation.protocol import Protocol
from lcm_lightning.evaluation.reference import RealImages, Reference, read_reference
from lcm_lightning.methods.lcm_lora import LCM
from lcm_lightning.models.sampling import DDIM
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.output.progress import image_progress

ASSETS = Path(__file__).parent.parent / "lcm_lightning" / "assets"


def contender(name: str, role: str, *adapters: str, steps: int = 4, teacher: str = "") -> Contender:
    sampler = LCM if role == "student" else DDIM
    return Contender(name, role, adapters, sampler, steps, 1.0, teacher)


def test_a_batch_keeps_its_latents_and_is_drawn_again_without_them(tiny_model: StableDiffusion, tmp_path: Path):
    drawing = Drawing(["a dog", "a cat", "a boat"], seed=0, resolution=32, batch_size=2)
    drawn = []
    with image_progress(disable=True) as progress:

        def draw() -> int:
            how = contender("base", "base", steps=1)
            return draw_missing(tiny_model, how, drawing, tmp_path, Fabric(accelerator="cpu", devices=1), progress)

        drawn.append(draw())
        files = [latents_file(tmp_path, batch) for batch in drawing.batches()]
        kept = load_file(files[0])["latents"]
        drawn.append(draw())
        files[0].unlink()
        drawn.append(draw())
    assert drawn == [3, 0, 2]
    assert kept.dtype == torch.float16 and kept.shape == (2, 4, 8, 8)
    assert torch.equal(load_file(files[0])["latents"], kept)
    assert not list(tmp_path.glob(".*"))
    pixels = (tiny_model.decode_latents(read_latents(tmp_path, range(0, 2)))[1] * 255).round()
    image = torch.from_numpy(np.array(Image.open(image_file(tmp_path, 1)))).permute(2, 0, 1)
    assert (pixels - image).abs().max() <= 3


def test_pictures_that_are_not_finite_are_refused_and_not_kept(tiny_model: StableDiffusion, tmp_path: Path):
    tiny_model.unet.conv_out.weight.data[0, 0] = float("nan")
    drawing = Drawing(["a dog"], seed=0, resolution=32, batch_size=1)
    fabric = Fabric(accelerator="cpu", devices=1)
    with (
        image_progress(disable=True) as progress,
        pytest.raises(UserError, match=r"1 step: draws pictures whose values are not finite; try dtype=float32"),
    ):
        draw_missing(tiny_model, contender("base", "base", steps=1), drawing, tmp_path, fabric, progress)
    assert not list(tmp_path.iterdir())


def test_only_bars_of_images_tell_images_per_second():
    console = Console(file=io.StringIO(), width=100)
    with image_progress(console) as progress:
        progress.advance(progress.add_task("drawing", total=4), 2)
        progress.advance(progress.add_task("intervals", total=4, counts_images=False), 2)
    drawing, intervals = [line for line in console.file.getvalue().splitlines() if "2/4" in line][-2:]
    assert "drawing" in drawing and "images/s" in drawing
    assert "intervals" in intervals and "images/s" not in intervals


def test_students_and_hurried_teachers_are_held_against_the_teacher_at_full_length():
    best = contender("finetuned", "finetuned", "finetuned", steps=50)
    teacher = best.slug
    lineup = [
        contender("base", "base", steps=50, teacher=teacher),
        Contender(**{**vars(best), "teacher": teacher}),
        contender("undistilled", "undistilled", "finetuned", teacher=teacher),
        contender("lcm_lora", "student", "finetuned", "lcm", teacher=teacher),
        contender("orphan", "student", "lcm", teacher="not there"),
    ]
    assert teachers_of(lineup) == {2: 1, 3: 1}


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(str(ASSETS / "tiny_clip"))


def random_images(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(coarse, (64, 64)) * 255).to(torch.uint8)


def write_drawing(folder: Path, images: torch.Tensor, latents: torch.Tensor, drawing: Drawing) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(image_file(folder, index))
    for batch in drawing.batches():
        save_file({"latents": latents[batch.start : batch.stop].half()}, latents_file(folder, batch))
    return folder


def test_measured_figures_of_a_teacher_a_copy_of_it_and_a_stranger(clip: Clip, tmp_path: Path):
    n, photos = 24, 12
    extractor = ClipPatches(clip)
    real = random_images(photos, seed=9)
    captions = tuple((f"red {i}", f"blue {i}", "unused") for i in range(photos))
    reference = Reference(captions, {clip.name: clip(real).numpy(), extractor.name: extractor(real).numpy()}, real, ())
    drawing = Drawing(reference.prompts(2), seed=0, resolution=64, batch_size=5)
    images, latents = random_images(n, seed=1), torch.randn(n, 4, 8, 8)
    folders = [
        write_drawing(tmp_path / "images" / "teacher", images, latents, drawing),
        write_drawing(tmp_path / "images" / "copy", images, latents, drawing),
        write_drawing(tmp_path / "images" / "stranger", random_images(n, seed=2), latents + 1, drawing),
    ]
    teacher = contender("base", "base", steps=50)
    students = [contender("lcm_lora", "student", "lcm", steps=k, teacher=teacher.slug) for k in (4, 1)]
    source = ModelSource("a", "a", lambda: None)
    drawn = [ModelImages(c, source, "w", f) for c, f in zip([teacher, *students], folders, strict=True)]
    protocol = Protocol("test", "unused", captions_per_image=2, bootstrap_samples=40)
    with image_progress(disable=True) as progress:
        found = measure(drawn, drawing, reference, extractor, clip, protocol, progress)
    entries = dict(zip(("teacher", "copy", "stranger"), found.metrics, strict=True))
    metrics = {"fid", "kid", "cmmd", "clip_score", "precision", "recall", "density", "coverage"}
    for entry in entries.values():
        assert metrics <= set(entry) and "fid_infinity" not in entry  # 12 photos say nothing of a limit
        for name in metrics:
            value = entry[name]
            assert value["low"] <= value["value"] <= value["high"] and value["n"] == n and value["standard_error"] >= 0
    generated = extractor(images).numpy()
    expected = frechet_distance(generated, reference.features[extractor.name])
    assert entries["teacher"]["fid"]["value"] == pytest.approx(expected)
    scale = np.sqrt((reference.features[extractor.name].astype(np.float64) ** 2).mean())
    resampling = Resampling.of(np.repeat(np.arange(photos), 2), photos, 0)
    expected = kid(reference.features[extractor.name] / scale, resampling).draws(generated / scale)[0]
    assert entries["teacher"]["kid"]["value"] == pytest.approx(expected)
    assert "to_teacher" not in entries["teacher"]
    copy, stranger = entries["copy"]["to_teacher"], entries["stranger"]["to_teacher"]
    assert copy["teacher"] == stranger["teacher"] == teacher.slug
    assert {name: copy[name]["value"] for name in ("latent_mse", "psnr", "perceptual")} == pytest.approx(
        {"latent_mse": 0, "psnr": 100, "perceptual": 0}, abs=1e-6
    )
    assert stranger["latent_mse"]["value"] == pytest.approx(1, abs=0.01)
    assert stranger["psnr"]["value"] < 20 and stranger["ssim"]["value"] < 0.9 and stranger["perceptual"]["value"] > 0.01
    assert copy["perceptual"]["distance"] == "clip-patches:tiny_clip"
    compared = set(COMPARED) - {"fid_infinity"}
    assert len(found.comparisons) == 3 * len(compared) and {c["metric"] for c in found.comparisons} == compared
    for comparison in found.comparisons:
        gap = comparison["difference"]
        entry = {images.contender.slug: e for images, e in zip(drawn, found.metrics, strict=True)}
        a, b = (entry[comparison[side]][comparison["metric"]]["value"] for side in ("a", "b"))
        assert gap["value"] == pytest.approx(a - b) and gap["low"] <= gap["value"] <= gap["high"]
    same = [c["difference"] for c in found.comparisons if (c["a"], c["b"]) == (teacher.slug, students[0].slug)]
    assert [(c["low"], c["value"], c["high"]) for c in same] == [(0, 0, 0)] * len(compared)


def test_differences_of_fid_and_of_its_limit_are_paired_on_the_same_halves():
    """A model and the same with one feature moved: what both share cancels, the limit takes off the bias of both."""
    rng, n, d = np.random.default_rng(0), 80, 8
    real, x = rng.normal(size=(n, d)), rng.normal(size=(n, d)) + 1
    names = {"features": "f", "clip": "f"}
    reference = Reference(tuple(("a",) for _ in range(n)), {"f": real}, torch.empty(0), ())
    suite = MetricSuite(Resampling.of(np.arange(n), n, 30), reference, rng.normal(size=(n, d)), **names)
    moved = x + np.eye(d)[0]
    (estimates, a), (_, b) = suite.compute({"f": moved}), suite.compute({"f": x})
    found = {c["metric"]: c["difference"] for c in compare({"a": a, "b": b}, n)}
    assert set(found) == set(COMPARED) and found["fid_infinity"]["low"] > 0
    assert found["fid"]["standard_error"] < estimates["fid"]["standard_error"]
    assert estimates["fid_infinity"]["value"] < estimates["fid"]["value"]
    gap = a["fid_infinity"][0] - b["fid_infinity"][0]
    assert found["fid_infinity"]["value"] == pytest.approx(gap)


@pytest.fixture(scope="module")
def emoji(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """Features of the same 1,513 emoji in two drawings, by data set and kind of feature."""
    cache = str(tmp_path_factory.mktemp("cache"))
    found = {}
    with image_progress(disable=True) as progress:
        for name in ("noto_emoji", "twemoji"):
            real = RealImages(name, str(ASSETS / "data" / name), "train", None, 64, cache)
            features = read_reference(real, [ClipPatches(clip), clip], progress).features
            found[name] = {"patches": features["clip-patches:tiny_clip"], "projected": features["clip:tiny_clip"]}
    return found


@pytest.mark.slow
def test_real_images_are_at_no_distance_from_themselves_and_extrapolate_to_none_from_their_other_half(emoji):
    real = emoji["noto_emoji"]["patches"].astype(np.float64)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-3)
    order = np.random.default_rng(0).permutation(len(real))
    half = len(real) // 2
    distance = FrechetDistance(real[order[:half]], real[order[half : 2 * half]])
    resampling = Resampling.of(np.arange(half), half, 50)
    draws = distance.draws(resampling.generated, resampling.real)
    plain, limit = (
        estimate(values, half, corrected=True) for values in (draws, frechet_infinity(draws, resampling, real.shape[1]))
    )
    assert plain.low > 0  # 756 images are biased beyond their own interval
    assert limit.low <= 0 <= limit.high


@pytest.mark.slow
def test_patch_features_tell_drawing_styles_apart_better_than_projected_ones(emoji):
    def style_over_chance(kind: str) -> float:
        noto, other = emoji["noto_emoji"][kind], emoji["twemoji"][kind]
        order = np.random.default_rng(0).permutation(len(noto))
        a, b = order[:756], order[756:1512]
        return frechet_distance(other[a], noto[b]) / frechet_distance(noto[a], noto[b])

    assert style_over_chance("patches") > 1.5 * style_over_chance("projected")
