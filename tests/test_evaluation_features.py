"""Feature extractors give what their papers and their names say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel

from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.features import Clip, ClipPatches, extract_features, make_extractor, weights_digest
from lcm_lightning.evaluation.reference import RealImages, Spread, evenly, read_reference
from lcm_lightning.output.progress import image_progress

TINY_CLIP = Path(__file__).parent.parent / "lcm_lightning" / "assets" / "tiny_clip"


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(str(TINY_CLIP))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_patch_features_are_the_mean_of_the_image_towers_last_patches(clip: Clip, images: torch.Tensor):
    tower = CLIPVisionModel.from_pretrained(TINY_CLIP).eval()
    with torch.no_grad():
        tokens = tower(pixel_values=(images / 255 - clip.mean) / clip.std).last_hidden_state
    assert tokens.shape == (3, 1 + 8 * 8, 256)
    found = ClipPatches(clip)(images)
    torch.testing.assert_close(found, sum(tokens[:, i] for i in range(1, 65)) / 64, atol=1e-4, rtol=0)


def test_results_name_the_features_they_were_measured_on(clip: Clip):
    device = torch.device("cpu")
    assert make_extractor("clip", clip, None, device).name == "clip:tiny_clip"
    assert make_extractor("clip_patches", clip, None, device).name == "clip-patches:tiny_clip"
    assert weights_digest(ClipPatches(clip)) == weights_digest(clip)
    with pytest.raises(UserError, match=r"evaluation\.features=vgg: expected inception, clip_patches, clip or auto"):
        make_extractor("vgg", clip, None, device)


def test_one_pass_of_the_image_tower_serves_every_feature(clip: Clip, images: torch.Tensor):
    class Brightness:
        name = "brightness"

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean(dim=(2, 3))

    passes = []
    hook = clip.model.vision_model.register_forward_hook(lambda *_: passes.append(1))
    found, patches = extract_features(images, [Brightness(), ClipPatches(clip), clip])
    hook.remove()
    assert len(passes) == 1 and set(patches) == {clip.name}
    for extractor in (Brightness(), ClipPatches(clip), clip):
        torch.testing.assert_close(found[extractor.name], extractor(images))


def test_features_of_real_images_are_computed_once_for_each_network_and_kind(clip: Clip, tmp_path: Path):
    data = TINY_CLIP.parent / "data" / "noto_emoji"
    passes = []
    hook = clip.model.vision_model.register_forward_hook(lambda *_: passes.append(1))

    def read(images: int, *extractors: Clip | ClipPatches) -> tuple[dict[str, np.ndarray], int]:
        passes.clear()
        real = RealImages("noto_emoji", str(data), "val", images, 64, str(tmp_path))
        with image_progress(disable=True) as progress:
            return dict(read_reference(real, list(extractors), progress).features), len(passes)

    first, looked = read(4, ClipPatches(clip), clip)
    assert looked == 1 and set(first) == {"clip-patches:tiny_clip", "clip:tiny_clip"}
    again, looked = read(4, ClipPatches(clip), clip)
    assert looked == 0 and all(np.array_equal(first[name], again[name]) for name in first)
    assert read(4, clip)[1] == 1 and read(5, ClipPatches(clip), clip)[1] == 1
    with torch.no_grad():
        clip.model.visual_projection.weight *= 2
    assert read(4, clip)[1] == 1
    with torch.no_grad():
        clip.model.visual_projection.weight /= 2
    hook.remove()


def test_a_rewritten_shard_of_the_same_size_gives_its_own_captions_and_photos(clip: Clip, tmp_path: Path):
    shards, shard = TINY_CLIP.parent / "data" / "noto_emoji", tmp_path / "photos" / "val-0.tar"
    shard.parent.mkdir()
    shard.write_bytes(next(shards.glob("val-*.tar")).read_bytes())
    real = RealImages("photos", str(shard.parent), "val", 4, 64, str(tmp_path / "cache"))
    with image_progress(disable=True) as progress:
        caption = read_reference(real, [clip], progress).captions[0][0]
        other, size = "x" * len(caption), shard.stat().st_size
        shard.write_bytes(shard.read_bytes().replace(caption.encode(), other.encode()))
        assert shard.stat().st_size == size
        assert read_reference(real, [clip], progress).captions[0][0] == other


@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, 300, 5000])
def test_the_photos_shown_are_spread_over_all_of_them(length: int):
    spread = Spread(16)
    for place in range(length):
        spread.offer(torch.tensor(place))
    places = [place for place, _ in spread.kept()]
    assert [image.item() for _, image in spread.kept()] == places == sorted(set(places))
    assert len(places) == min(length, 16) and places[0] == 0
    assert max(np.diff([*places, length])) <= 2 * -(-length // 16)


def test_even_places_run_from_the_first_to_the_last():
    assert evenly(300, 4) == [0, 100, 199, 299]
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(9, 1) == [0]
