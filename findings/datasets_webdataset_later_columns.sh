#!/usr/bin/env bash
# datasets 5.2.0: of WebDataset shards it reads only what the first five samples of the first shard have; later pictures become None.
#
# load_dataset("webdataset") takes its columns from five samples. They are refused if they differ among themselves, so one would
# think that a dataset which is not uniform is refused. A sixth sample that has its picture as .jpeg, .png or .JPG is not: its
# field belongs to no column and is dropped, and the column "jpg" is None, beside the right caption. So are all pictures of a
# second shard that was made of PNG files, and the keys of a JSON caption that the first five lack. No error, no warning, the
# number of samples is right, and streaming=True does the same. The webdataset library returns every one of these fields, and takes .JPG
# for .jpg. A trainer that skips samples without a picture, as many do, trains on part of the data, in this case a third.
#
# Output seen (datasets 5.2.0, webdataset 1.0.2, pillow 12.3.0, Python 3.11, Linux, 2026-11-28), two shards of 6 and 3 samples:
#   webdataset: 9 samples, pictures: jpg jpg jpg jpg jpg jpg jpg jpeg png, scores: - - - - - - - - 3
#   datasets: 9 samples, pictures: jpg jpg jpg jpg jpg jpg None None None, scores: - - - - - - - - -
#   datasets, streaming: 9 samples, pictures: jpg jpg jpg jpg jpg jpg None None None, scores: - - - - - - - - -
#   datasets, second shard first: ValueError
# What helps: write all pictures under one name (jpg for PNG files too: Pillow reads the content), or pass features= that name
# every field of every shard, as it is spelt.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 webdataset==1.0.2 pillow==12.3.0

cat > "$folder/read.py" <<'PYTHON'
import io
import json
import tarfile

import datasets
import webdataset
from PIL import Image

datasets.disable_progress_bars()


def write(path, samples):
    with tarfile.open(path, "w") as shard:
        for key, (extension, caption) in samples.items():
            picture = io.BytesIO()
            Image.new("RGB", (8, 8)).save(picture, "PNG" if extension == "png" else "JPEG")
            for name, content in (f"{key}.{extension}", picture.getvalue()), (f"{key}.json", json.dumps(caption).encode()):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


def show(what, samples):
    """Samples as pairs: the fields that hold a picture, and the caption."""
    pictures, scores = [], []
    for fields, caption in samples:
        pictures.append(" ".join(sorted(fields)) or "None")
        scores.append(str(caption.get("score") or "-"))
    print(f"{what}: {len(pictures)} samples, pictures: {' '.join(pictures)}, scores: {' '.join(scores)}")


kinds = {"jpg", "jpeg", "png"}
text = {"text": "a dog"}
write("0.tar", {f"{number}": ("jpg", text) for number in range(6)})
write("1.tar", {"6": ("JPG", text), "7": ("jpeg", text), "8": ("png", {**text, "score": 3})})
shards = ["0.tar", "1.tar"]
show("webdataset", ((kinds & set(sample), json.loads(sample["json"]))
                    for sample in webdataset.WebDataset(shards, shardshuffle=False)))
for what, how in ("datasets", {}), ("datasets, streaming", {"streaming": True}):
    read = datasets.load_dataset("webdataset", data_files=shards, split="train", cache_dir="cache", **how)
    show(what, (({name for name in kinds if sample.get(name)}, sample["json"]) for sample in read))
try:
    datasets.load_dataset("webdataset", data_files=shards[::-1], split="train", cache_dir="cache")
    print("datasets, second shard first: read")
except ValueError:
    print("datasets, second shard first: ValueError")
PYTHON

(cd "$folder" && HF_HUB_OFFLINE=1 HF_HOME="$folder/home" venv/bin/python -W ignore read.py 2> err.log) | tee "$folder/out"
diff - "$folder/out" <<'SEEN'
webdataset: 9 samples, pictures: jpg jpg jpg jpg jpg jpg jpg jpeg png, scores: - - - - - - - - 3
datasets: 9 samples, pictures: jpg jpg jpg jpg jpg jpg None None None, scores: - - - - - - - - -
datasets, streaming: 9 samples, pictures: jpg jpg jpg jpg jpg jpg None None None, scores: - - - - - - - - -
datasets, second shard first: ValueError
SEEN
