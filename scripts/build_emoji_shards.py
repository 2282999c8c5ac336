"""Build the embedded emoji shards from two npm packages, byte for byte.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python scripts/build_emoji_shards.py --packages . --output lcm_lightning/assets/data

Flags, components and skin-tone variants are left out; an emoji enters both sets or neither, in the same split.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from lcm_lightning.data.plan import stable_hash
from lcm_lightning.data.records import Record
from lcm_lightning.data.writing import PARTS_NAME, ShardSettings, write_shards

VERSION = "16.0.0"
STYLES = {"noto_emoji": "google", "twemoji": "twitter"}
# About as many pictures as people have of a style: every fourth training name of what anyone recognises.
SMALL, SMALL_OF, EVERY = "twemoji_small", "twemoji", 4
RECOGNISED = ("smileys & emotion", "animals & nature", "food & drink")
LEFT_OUT = ("Flags", "Component")
# Unicode's words for "filled" and "outlined": its "heavy black heart" is the red one.
MISLEADING = {"black", "white", "heavy", "negative"}
COLOURED = {"heart": "red heart"}
# Of 100 names, 6 are held out for testing and 3 for validation.
TEST_PERCENT, VAL_PERCENT = 6, 3


def main() -> None:
    """Read both packages and write the folders of shards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder with the two .tgz files of `npm pack`")
    parser.add_argument("--output", type=Path, required=True, help="gets noto_emoji/, twemoji/ and twemoji_small/")
    arguments = parser.parse_args()
    for name, style in STYLES.items():
        found = list(records(arguments.packages / f"emoji-datasource-{style}-{VERSION}.tgz", style))
        write(found, arguments.output, name)
        if name == SMALL_OF:
            write(few(found), arguments.output, SMALL)


def write(found: Iterable[Record], output: Path, name: str) -> None:
    """Write a folder of shards and print how many pictures each split has."""
    folder = output / name
    index = write_shards(
        found,
        folder,
        name=name,
        split_origin=f"by a hash of the code point: {TEST_PERCENT} % test, {VAL_PERCENT} % val",
        settings=ShardSettings(samples_per_shard=400),
    )
    shutil.rmtree(folder / PARTS_NAME)  # what an interrupted run goes on from
    print(name, {split: part["samples"] for split, part in index["splits"].items()})


def few(found: Iterable[Record]) -> Iterator[Record]:
    """The pictures of the small set."""
    recognised = [record for record in found if record.captions[-1].endswith(RECOGNISED)]
    yield from [record for record in recognised if record.split == "train"][::EVERY]
    yield from (record for record in recognised if record.split != "train")


def records(package: Path, style: str) -> Iterator[Record]:
    """One record an emoji: 64 x 64 px on white as lossless WebP, with its captions."""
    with tarfile.open(package) as archive:
        entries = json.load(archive.extractfile("package/emoji.json"))
        for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
            if entry["category"] in LEFT_OUT or not all(entry[f"has_img_{s}"] for s in STYLES.values()):
                continue
            image = archive.extractfile(f"package/img/{style}/64/{entry['image']}").read()
            key = entry["unified"].lower()
            yield Record(key, on_white(image), captions(entry), split_of(key))


def on_white(image: bytes) -> bytes:
    """A picture with transparency, laid on white and encoded as lossless WebP."""
    picture = Image.open(io.BytesIO(image)).convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    encoded = io.BytesIO()
    canvas.convert("RGB").save(encoded, "WEBP", lossless=True, quality=75, method=4)
    return encoded.getvalue()


def captions(entry: dict[str, Any]) -> tuple[str, ...]:
    """What an emoji may be called, the most usual name first, without repeats.

    Its short names (":slightly_smiling_face:"), its Unicode name, and each of both with its subcategory.
    """
    short = [COLOURED.get(name, words(name)) for name in entry["short_names"]]
    name = words(entry["name"] or entry["short_name"])
    if MISLEADING & (set(name.split()) - set(" ".join(short).split())):
        name = short[0]
    kind, category = words(entry["subcategory"]), entry["category"].lower()
    return tuple(dict.fromkeys([*short, name, f"{short[0]}, {kind}", f"{name}, {category}"]))


def words(identifier: str) -> str:
    """ "OPEN-MOUTH_FACE" as "open mouth face"."""
    return " ".join(identifier.lower().replace("_", " ").replace("-", " ").split())


def split_of(key: str) -> str:
    """Split of a code point, the same in every style."""
    percent = stable_hash(key) % 100
    return "test" if percent < TEST_PERCENT else "val" if percent < TEST_PERCENT + VAL_PERCENT else "train"


if __name__ == "__main__":
    main()
