"""Data sets as people have them: each is read as meant, or refused in one sentence that says where and what to do."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from lcm_lightning.data.layouts import Contents
from lcm_lightning.data.sources import read_source
from lcm_lightning.data.writing import ShardSettings, write_shards
from lcm_lightning.errors import UserError


def picture(format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, format)
    return buffer.getvalue()


JPEG = picture()
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
Files = dict[str, str | bytes]


def images(*names: str) -> Files:
    return dict.fromkeys(names, JPEG)


def table(content: str, name: str = "captions.txt", photos: tuple[str, ...] = ("0.jpg", "1.jpg", "2.jpg")) -> Files:
    return {name: content, **images(*(f"Images/{photo}" for photo in photos))}


def metadata(content: str | list[dict], name: str = "metadata.csv") -> Files:
    if not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    return {name: content, **images("0.jpg", "1.jpg")}


THREE = {"0.jpg": ["a"], "1.jpg": ["b"], "2.jpg": ["c"]}
TWO = {"0.jpg": ["a"], "1.jpg": ["b"]}
FIVE = [f"caption {number}" for number in range(5)]
TOKENS = "".join(f"{n}.jpg#{k}\t{text}\n" for n, text in enumerate("abc") for k in (0,))

# Captions by the image's file name.
READ: dict[str, tuple[Files, dict[str, list[str]]]] = {
    # captions.txt and results.csv
    "kaggle": (table("image,caption\n0.jpg,a\n1.jpg,b\n2.jpg,c\n"), THREE),
    "another column behind": (table("image,caption,split\n0.jpg,a,train\n1.jpg,b,train\n2.jpg,c,test\n"), THREE),
    "two columns of captions": (
        table("image,caption_1,caption_2\n0.jpg,a,x\n1.jpg,b,y\n2.jpg,c,z\n"),
        {"0.jpg": ["a", "x"], "1.jpg": ["b", "y"], "2.jpg": ["c", "z"]},
    ),
    "bare commas in the last column": (
        table("image,caption\n0.jpg,a, x\n1.jpg,b\n2.jpg,c\n"),
        THREE | {"0.jpg": ["a, x"]},
    ),
    "bars, captions that begin with numbers": (
        table("image|caption\n0.jpg|2 dogs\n1.jpg|b\n2.jpg|10 cats\n"),
        {"0.jpg": ["2 dogs"], "1.jpg": ["b"], "2.jpg": ["10 cats"]},
    ),
    "windows line ends": (table("image,caption\r\n0.jpg,a\r\n1.jpg,b\r\n2.jpg,c\r\n"), THREE),
    "byte order mark": (table("\ufeffimage,caption\n0.jpg,a\n1.jpg,b\n2.jpg,c\n"), THREE),
    "no line end at the end": (table("image,caption\n0.jpg,a\n1.jpg,b\n2.jpg,c"), THREE),
    "blank lines": (table("\nimage,caption\n\n0.jpg,a\n1.jpg,b\n\n2.jpg,c\n\n"), THREE),
    "no header": (table("0.jpg,a\n1.jpg,b\n2.jpg,c\n"), THREE),
    "no header, with bare commas": (table("0.jpg,a , x\n1.jpg,b\n2.jpg,c\n"), THREE | {"0.jpg": ["a , x"]}),
    "no header, with numbers": (table("0.jpg,0,a\n1.jpg,0,b\n2.jpg,0,c\n"), THREE),
    "no header, with tabs": (table("0.jpg\ta\n1.jpg\tb\n2.jpg\tc\n"), THREE),
    "no header, with bars": (table("0.jpg| 0| a\n1.jpg| 0| b\n2.jpg| 0| c\n", "results.csv"), THREE),
    "a token file by another name": (table(TOKENS), THREE),
    "tabs": (table("image\tcaption\n0.jpg\ta, x\n1.jpg\tb\n2.jpg\tc\n"), THREE | {"0.jpg": ["a, x"]}),
    "semicolons": (table("image;caption\n0.jpg;a, x\n1.jpg;b\n2.jpg;c\n"), THREE | {"0.jpg": ["a, x"]}),
    "a quote never closed": (table('image,caption\n0.jpg,a\n1.jpg,"b\n2.jpg,c\n'), THREE | {"1.jpg": ['"b']}),
    "a quote never closed, in the last line": (
        table('image,caption\n0.jpg,a\n1.jpg,b\n2.jpg,"c\n'),
        THREE | {"2.jpg": ['"c']},
    ),
    "a quote never closed, and another": (
        table('image,caption\n0.jpg,"a\n1.jpg,b\n2.jpg,"c\n'),
        THREE | {"0.jpg": ['"a'], "2.jpg": ['"c']},
    ),
    "a quote that begins a caption": (table('0.jpg,"a" x\n1.jpg,b\n2.jpg,c\n'), THREE | {"0.jpg": ['"a" x']}),
    "a quoted caption over two lines": (
        table('image,caption\n0.jpg,"a\nx"\n1.jpg,b\n2.jpg,c\n'),
        THREE | {"0.jpg": ["a x"]},
    ),
    "quotes doubled": (table('0.jpg,"a ""x"" , y"\n1.jpg,b\n2.jpg,c\n'), THREE | {"0.jpg": ['a "x" , y']}),
    "a caption missing": (table("image,caption\n0.jpg,a\n1.jpg\n2.jpg,\n"), {"0.jpg": ["a"], "1.jpg": [], "2.jpg": []}),
    "names with dots": (
        table("image,caption\np.v0.jpg,a\np.v1.jpg,b\n", photos=("p.v0.jpg", "p.v1.jpg")),
        {"p.v0.jpg": ["a"], "p.v1.jpg": ["b"]},
    ),
    "names that differ in suffix": (
        table("image,caption\np.jpg,a\np.png,b\n", photos=("p.jpg", "p.png")),
        {"p.jpg": ["a"], "p.png": ["b"]},
    ),
    "quoted names with commas": (table('image,caption\n"p, q.jpg",a\n', photos=("p, q.jpg",)), {"p, q.jpg": ["a"]}),
    "a token file": (table(TOKENS, "Flickr8k.token.txt"), THREE),
    "no header, first caption begins with a number": (
        table("0.jpg,2,maybe 3 dogs\n1.jpg,b\n2.jpg,c , x\n"),
        {"0.jpg": ["2,maybe 3 dogs"], "1.jpg": ["b"], "2.jpg": ["c , x"]},
    ),
    "bars, a caption with a bar behind a number": (
        table("image|caption\n0.jpg|a\n1.jpg|3 | 4 men\n2.jpg|c\n"),
        THREE | {"1.jpg": ["3 | 4 men"]},
    ),
    "lists as Python writes them": (
        table('image,caption\n0.jpg,"[\'a\', \'x\']"\n1.jpg,"[""b\'s""]"\n2.jpg,[c]\n'),
        {"0.jpg": ["a", "x"], "1.jpg": ["b's"], "2.jpg": ["[c]"]},
    ),
    "a column of prompts": (table("image,prompt,seed\n0.jpg,a,7\n1.jpg,b,8\n2.jpg,c,9\n"), THREE),
    "names in other cases": (
        table("image,caption\nA.JPG,a\nb.jpg,b\n", photos=("a.jpg", "b.JPG")),
        {"a.jpg": ["a"], "b.JPG": ["b"]},
    ),
    "names in another form of Unicode": (
        table("image,caption\ncafe\u0301.jpg,a\n", photos=("caf\u00e9.jpg",)),
        {"caf\u00e9.jpg": ["a"]},
    ),
    "names with folders": (
        table("image,caption\nx/0.jpg,a\nImages/x/1.jpg,b\ny\\2.jpg,c\n", photos=("x/0.jpg", "x/1.jpg", "y/2.jpg")),
        THREE,
    ),
    "photos beside the table, some with a file of their own": (
        table("image,caption\n0.jpg,a\n2.jpg,c\n") | {"Images/1.txt": "b", "Images/0.txt": "not this"},
        THREE,
    ),
    "tables in several folders": (
        {"train/captions.txt": "image,caption\n0.jpg,a\n", "test/captions.txt": "image,caption\n1.jpg,b\n2.jpg,c\n"}
        | images("train/Images/0.jpg", "test/Images/1.jpg", "test/Images/2.jpg"),
        THREE,
    ),
    "captions.csv": (table("image,caption\n0.jpg,a\n1.jpg,b\n2.jpg,c\n", "captions.csv"), THREE),
    "COCO 2017": (
        {
            "annotations/captions_val2017.json": json.dumps(
                {
                    "images": [{"id": 7, "file_name": "0.jpg"}],
                    "annotations": [{"id": 1, "image_id": 7, "caption": "a"}],
                }
            ),
            **images("val2017/0.jpg"),
        },
        {"0.jpg": ["a"]},
    ),
    "the same table twice, one deeper": (
        table("image| comment_number| comment\n0.jpg| 0| a\n1.jpg| 0| b\n", "f/results.csv", photos=("0.jpg", "1.jpg"))
        | {"f/f/results.csv": "image| comment_number| comment\n0.jpg| 0| a\n1.jpg| 0| b\n"},
        TWO,
    ),
    "a second table of other captions": (
        table("image,caption\n0.jpg,a\n1.jpg,b\n2.jpg,c\n") | {"results.csv": "image,caption\n0.jpg,x\n1.jpg,b\n"},
        THREE | {"0.jpg": ["a", "x"]},
    ),
    "tables apart from the photos": (
        {"text/captions.txt": "image,caption\n0.jpg,a\n1.jpg,b\n", **images("photos/0.jpg", "photos/1.jpg")},
        TWO,
    ),
    # metadata
    "jsonl with five rows an image": (
        metadata([{"file_name": name, "text": text} for name in TWO for text in FIVE], "metadata.jsonl"),
        dict.fromkeys(TWO, FIVE),
    ),
    "csv with five rows an image": (
        metadata("file_name,text\n" + "".join(f"{name},{text}\n" for text in FIVE for name in TWO)),
        dict.fromkeys(TWO, FIVE),
    ),
    "rows and lists of captions": (
        metadata(
            [{"file_name": "0.jpg", "captions": ["a", "x"]}, {"file_name": "./0.jpg", "captions": ["y"]}],
            "metadata.jsonl",
        ),
        {"0.jpg": ["a", "x", "y"], "1.jpg": []},
    ),
    "the same table twice": (
        metadata("file_name,text\n0.jpg,a\n1.jpg,b\n")
        | {"metadata.jsonl": '{"file_name": "0.jpg", "text": "a"}\n{"file_name": "1.jpg", "text": "b"}\n'},
        TWO,
    ),
    "csv with tabs": (metadata("file_name\ttext\n0.jpg\ta\n1.jpg\tb\n"), TWO),
    "csv of a German spreadsheet": (metadata("\ufefffile_name;text\r\n0.jpg;a\r\n1.jpg;b\r\n"), TWO),
    "csv with bare commas": (metadata("file_name,text\n0.jpg,a, x\n1.jpg,b\n"), TWO | {"0.jpg": ["a, x"]}),
    "csv with a quote never closed": (metadata('file_name,text\n0.jpg,"a\n1.jpg,b\n'), TWO | {"0.jpg": ['"a']}),
    "csv with a quoted caption over two lines": (
        metadata('text,file_name\n"a\nx",0.jpg\nb,1.jpg\n'),
        TWO | {"0.jpg": ["a x"]},
    ),
    "csv with other columns": (metadata("id,file_name,text,width\n7,0.jpg,a,40\n8,1.jpg,b,40\n"), TWO),
    "csv with lists as JSON": (
        metadata('file_name,captions\n0.jpg,"[""a"", ""x""]"\n1.jpg,"[""b""]"\n'),
        {"0.jpg": ["a", "x"], "1.jpg": ["b"]},
    ),
    "columns in capitals": (metadata("file_name,TEXT\n0.jpg,a\n1.jpg,b\n"), TWO),
    "captions before texts": (metadata("file_name,text,caption\n0.jpg,OCR,a\n1.jpg,OCR,b\n"), TWO),
    "numbered captions beside one without": (
        metadata("file_name,caption_10,caption,caption_2\n0.jpg,z,a,x\n1.jpg,,b,\n"),
        {"0.jpg": ["a", "x", "z"], "1.jpg": ["b", ""]},
    ),
    "an empty caption beside a text": (
        metadata("file_name,caption,text\n0.jpg,,a\n1.jpg,b,OCR\n"),
        TWO,
    ),
    "an empty caption beside a text, in json": (
        metadata(
            '{"file_name": "0.jpg", "caption": " ", "text": "a"}\n{"file_name": "1.jpg", "text": "b"}\n',
            "metadata.jsonl",
        ),
        TWO,
    ),
    "an empty caption beside a text, in a table": (
        images("0.jpg", "1.jpg") | {"captions.txt": "image,caption,text\n0.jpg,,a\n1.jpg,b,OCR\n"},
        TWO,
    ),
    "quotes within a text of a list": (
        metadata("""file_name,text\n0.jpg,"['it says ""a"" ""b""']"\n1.jpg,"[""it says 'a' 'b'""]"\n"""),
        {"0.jpg": ['it says "a" "b"'], "1.jpg": ["it says 'a' 'b'"]},
    ),
    "quotes within texts of a list as numpy writes it": (
        metadata("""file_name,text\n0.jpg,"['says ""a"" ""x""'\n ""it's""]"\n1.jpg,b\n"""),
        {"0.jpg": ['says "a" "x"', "it's"], "1.jpg": ["b"]},
    ),
    "lists as numpy writes them": (
        metadata("file_name,captions\n0.jpg,\"['a'\n 'x']\"\n1.jpg,['b']\n"),
        {"0.jpg": ["a", "x"], "1.jpg": ["b"]},
    ),
    "quotes as MySQL escapes them": (
        metadata('file_name,text\n0.jpg,"a \\"x\\""\n1.jpg,"b"\n'),
        TWO | {"0.jpg": ['a "x"']},
    ),
    "blanks behind commas": (metadata('file_name, text\n0.jpg, "a, x"\n1.jpg, b\n'), TWO | {"0.jpg": ["a, x"]}),
    "blanks behind names": (metadata("file_name,text\n0.jpg ,a\n1.jpg ,b\n"), TWO),
    "nan written out": (metadata("file_name,text\n0.jpg,a\n1.jpg,nan\n"), {"0.jpg": ["a"], "1.jpg": []}),
    "a column of prompts, in metadata": (metadata("file_name,prompt\n0.jpg,a\n1.jpg,b\n"), TWO),
    "nothing as pandas writes it": (
        metadata(
            '{"file_name": "0.jpg", "text": NaN}\n{"file_name": "1.jpg", "text": [null, "b"]}\n', "metadata.jsonl"
        ),
        {"0.jpg": [], "1.jpg": ["b"]},
    ),
    "a caption that looks like a list": (
        metadata("file_name,text\n0.jpg,[a\n1.jpg,[b]\n"),
        {"0.jpg": ["[a"], "1.jpg": ["[b]"]},
    ),
    "metadata of some, files beside others": (
        images("0.jpg", "1.jpg", "2.jpg")
        | {"metadata.jsonl": '{"file_name": "0.jpg", "text": "a"}\n', "1.txt": "b", "0.txt": "not this"},
        {"0.jpg": ["a"], "1.jpg": ["b"], "2.jpg": []},
    ),
    "metadata in one folder, files in another": (
        images("x/0.jpg", "y/1.jpg") | {"x/metadata.csv": "file_name,text\n0.jpg,a\n", "y/1.txt": "b"},
        TWO,
    ),
    "backslashes of Windows": (
        images("x/0.jpg", "1.jpg") | {"metadata.csv": "file_name,text\nx\\0.jpg,a\n1.jpg,b\n"},
        TWO,
    ),
    # files beside images
    "txt beside": (images("0.jpg", "1.jpg") | {"0.txt": "a\n", "1.txt": "b"}, TWO),
    "caption beside": (images("0.jpg", "1.jpg") | {"0.caption": "a\n", "1.caption": "b"}, TWO),
    "txt and caption beside": (images("0.jpg", "1.jpg") | {"0.txt": "a", "0.caption": "x", "1.caption": "b"}, TWO),
    "boxes beside": (
        images("0.jpg", "1.jpg") | {"0.txt": "0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.05 0.05\n", "1.txt": "2 dogs 3 4 5"},
        {"0.jpg": [], "1.jpg": ["2 dogs 3 4 5"]},
    ),
    "capital .TXT beside": (images("0.jpg", "1.jpg") | {"0.TXT": "a", "1.CAPTION": "b"}, TWO),
    "files behind whole names": (images("0.jpg", "1.jpg") | {"0.jpg.txt": "a", "1.jpg.caption": "b"}, TWO),
    "an empty txt before a caption": (images("0.jpg", "1.jpg") | {"0.txt": " ", "0.caption": "a", "1.txt": "b"}, TWO),
    "hidden folders of tools": (
        images("0.jpg", "1.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", "__MACOSX/._1.jpg", "__MACOSX/1.jpg")
        | {"0.txt": "a", "1.txt": "b"},
        TWO,
    ),
    "dots beside": (
        images("p.v0.jpg", "p.v1.jpg") | {"p.v0.txt": "a", "p.v1.txt": "b"},
        {
            "p.v0.jpg": ["a"],
            "p.v1.jpg": ["b"],
        },
    ),
    "capital suffixes": (images("0.JPG", "1.JPEG") | {"0.txt": "a", "1.txt": "b"}, {"0.JPG": ["a"], "1.JPEG": ["b"]}),
    "jfif": (images("0.jfif", "1.jpe") | {"0.txt": "a", "1.txt": "b"}, {"0.jfif": ["a"], "1.jpe": ["b"]}),
    "kohya's folders": (
        images("10_dog/0.jpg", "5_cat/1.jpg") | {"10_dog/0.caption": "a", "5_cat/1.txt": "b"},
        TWO,
    ),
    "kohya's folders without captions": (
        images("img/10_sks dog/0.jpg", "img/1_cat/1.jpg"),
        {"0.jpg": ["sks dog"], "1.jpg": ["cat"]},
    ),
    "one folder of kohya's, some with captions": (
        images("10_dog/0.jpg", "10_dog/1.jpg") | {"10_dog/0.txt": "a"},
        {"0.jpg": ["a"], "1.jpg": ["dog"]},
    ),
}

# A folder's files, and what the message must hold.
REFUSED: dict[str, tuple[Files, str]] = {
    "a column twice": (
        metadata("file_name,text,text\n0.jpg,a,x\n"),
        r"metadata\.csv cannot be read \(two columns are called text: rename one\)",
    ),
    "file names twice": (
        metadata("file_name,text,file_name\n0.jpg,a,1.jpg\n"),
        r"two columns are called file_name: rename one",
    ),
    "a key twice": (
        metadata('{"file_name": "0.jpg", "text": "a", "text": "x"}\n', "metadata.jsonl"),
        r"metadata\.jsonl cannot be read \(two columns are called text: rename one\)",
    ),
    "an empty table": (table(""), r"captions\.txt .*one column.*tab, semicolon or \| for comma"),
    "bare commas in a column that is not the last": (
        table("filename,split,caption,source\n0.jpg,train,a, with comma,web\n"),
        r"captions\.txt .*row 1 has 5 columns, not 4: quote captions with commas",
    ),
    "blanks between the columns": (table("0.jpg a dog\n1.jpg b\n"), r"captions\.txt .*'0\.jpg a dog' has one column"),
    "the caption first": (
        table("caption,image\na,0.jpg\n"),
        r"captions\.txt .*'a' in the first column is no file name",
    ),
    "a number first": (
        table(",image,caption\n0,0.jpg,a\n"),
        r"captions\.txt .*'0' in the first column is no file name",
    ),
    "not UTF-8": ({"captions.txt": b"image,caption\n0.jpg,caf\xe9\n"}, r"captions\.txt cannot be read .* UTF-8"),
    "a name outside the folder": (
        table("image,caption\n../../0.png,a\n"),
        r"names \.\./\.\./0\.png, outside the folder",
    ),
    "a quote in the middle never closed": (
        metadata('text,file_name\n"a,0.jpg\nb,1.jpg\n'),
        r"metadata\.csv .*quote in line 2 is not closed",
    ),
    "a quote never closed in a long table": (
        metadata('text,file_name\nx,1.jpg\n"a,0.jpg\n' + "b,1.jpg\n" * 5000),
        r"metadata\.csv .*quote in line 3 is not closed",
    ),
    "bare commas before other columns": (
        metadata("file_name,text,width\n0.jpg,a, x,40\n"),
        r"metadata\.csv .*row 1 has 4 columns, the header 3: quote captions",
    ),
    "a row without file name": (metadata([{"text": "a"}], "metadata.jsonl"), r"row 1: expected a file_name"),
    "a row that is cut off": (
        metadata('{"file_name": "0.jpg", "te', "metadata.jsonl"),
        r"metadata\.jsonl cannot be read",
    ),
    "a row in 100,000 objects": (
        metadata('{"a":' * 100_000, "metadata.jsonl"),
        r"metadata\.jsonl cannot be read",
    ),
    "no column of captions": (
        metadata("file_name,width\n0.jpg,40\n1.jpg,40\n"),
        r"metadata\.csv: none of its columns file_name, width holds captions; call one",
    ),
    "captions in dictionaries of a csv": (
        metadata('file_name,captions\n0.jpg,"{""en"": ""a""}"\n'),
        r"metadata\.csv cannot be read \(row 1: a caption is a dict",
    ),
    "captions in dictionaries": (
        metadata([{"file_name": "0.jpg", "captions": {"en": "a"}}], "metadata.jsonl"),
        r"metadata\.jsonl cannot be read \(row 1: a caption is a dict",
    ),
    "lists in lists": (
        metadata([{"file_name": "0.jpg", "captions": [["a"], ["x"]]}], "metadata.jsonl"),
        r"row 1: a caption is a list of others",
    ),
    "a file name that is a number": (
        metadata([{"file_name": 7, "text": "a"}], "metadata.jsonl"),
        r"row 1: expected a file",
    ),
    "an absolute name": (
        metadata("file_name,text\n/kaggle/input/0.jpg,a\n"),
        r"names /kaggle/input/0\.jpg, outside the folder; move",
    ),
    "images alone": (images("0.jpg"), r"(?s)no captioned images recognised.*\.caption.*10_dog"),
}


def folder_of(files: Files, folder: Path) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("case", READ)
def test_a_data_set_is_read_as_it_was_meant(case, tmp_path):
    files, expected = READ[case]
    source = read_source(str(folder_of(files, tmp_path)), "folder")
    records = list(source.records)
    assert {record.image.name: [c.strip() for c in record.captions] for record in records} == expected
    assert all(record.image.is_file() for record in records)
    assert len({record.key for record in records}) == len(records) == source.samples


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named_with_its_remedy(case, tmp_path):
    files, expected = REFUSED[case]
    for folder in (tmp_path, tmp_path / ("a_folder_of_a_long_name" * 8) / "photos"):
        with pytest.raises(UserError, match=expected) as refusal:
            read_source(str(folder_of(files, folder)), "folder")
        assert len(str(refusal.value)) <= 300 and "\n" not in str(refusal.value)


SPLITS: dict[str, tuple[Files, dict[str, str]]] = {
    "tables of each split, names repeated": (
        {f"{split}/captions.txt": f"image,caption\n0.jpg,{split}\n" for split in ("train", "test")}
        | images("train/0.jpg", "test/0.jpg"),
        {"train/0.jpg": "train", "test/0.jpg": "test"},
    ),
    "one table, photos by split": (
        {"captions.txt": "image,caption\n0.jpg,a\n1.jpg,b\n", **images("train/0.jpg", "val/1.jpg")},
        {"train/0.jpg": "train", "val/1.jpg": "val"},
    ),
    "splits below images/": (
        images("images/train/0.jpg", "images/testing/1.jpg") | {"images/train/0.txt": "a", "images/testing/1.txt": "b"},
        {"images/train/0.jpg": "train", "images/testing/1.jpg": "test"},
    ),
}


@pytest.mark.parametrize("case", SPLITS)
def test_folders_of_splits_are_kept_apart(case, tmp_path):
    files, expected = SPLITS[case]
    records = list(read_source(str(folder_of(files, tmp_path)), "folder").records)
    assert {record.image.relative_to(tmp_path).as_posix(): record.split for record in records} == expected
    assert len({record.key for record in records}) == len(records)


def test_linked_folders_are_read_and_circles_end(tmp_path):
    folder_of(images("0.jpg") | {"0.txt": "a"}, tmp_path / "elsewhere")
    folder_of(images("1.jpg") | {"1.txt": "b"}, tmp_path / "photos")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "photos")
    records = list(read_source(str(tmp_path / "photos"), "folder").records)
    assert {record.image.name: list(record.captions) for record in records} == TWO


def test_linked_folders_of_photos_beside_a_table_are_read(tmp_path):
    folder_of(images("0.jpg", "1.jpg"), tmp_path / "elsewhere")
    folder_of({"captions.txt": "image,caption\n0.jpg,a\n1.jpg,b\n"}, tmp_path / "set")
    (tmp_path / "set" / "Images").symlink_to(tmp_path / "elsewhere")
    records = list(read_source(str(tmp_path / "set"), "folder").records)
    assert all(record.image.is_file() for record in records) and len(records) == 2


@pytest.mark.parametrize(
    "name",
    ["0\0.jpg", "n" * 300 + ".jpg", "\ud800.jpg", "d" * 300 + "/0.jpg"],
    ids=["NUL", "long", "surrogate", "folder"],
)
def test_names_that_no_file_can_have_are_missing_images(name, tmp_path):
    rows = [{"file_name": "1.jpg", "text": "b"}, {"file_name": name, "text": "a"}]
    source = read_source(str(folder_of(metadata(rows, "metadata.jsonl"), tmp_path / "photos")), "folder")
    index = write_shards(source.records, tmp_path / "shards", name="x", settings=ShardSettings(min_side=8), workers=1)
    assert sum(index["skipped"].values()) == 2 and index["skipped"]["no caption"] == 1  # 0.jpg has none


def test_names_in_an_old_encoding_are_read(tmp_path):
    folder = folder_of(images("1.jpg") | {"1.txt": "b"}, tmp_path / "photos")
    for name, content in ((b"caf\xe9.jpg", JPEG), (b"caf\xe9.txt", b"a"), (b"th\xe9.jpg", JPEG)):
        (folder / os.fsdecode(name)).write_bytes(content)
    source = read_source(str(folder), "folder")
    index = write_shards(source.records, tmp_path / "shards", name="x", settings=ShardSettings(min_side=8), workers=1)
    assert sum(part["samples"] for part in index["splits"].values()) == 2 and index["skipped"] == {"no caption": 1}


def test_kohyas_repeats_are_said_to_be_ignored_once(tmp_path):
    files = images(*(f"{number}_dog/{number}.jpg" for number in range(1, 4))) | {"1_dog/1.txt": "a"}
    source = read_source(str(folder_of(files, tmp_path)), "folder")
    assert "repeats are ignored; 2 are captioned by their folder's name" in source.layout


def test_kohyas_pictures_for_regularisation_are_left_out_and_counted(tmp_path):
    files = images("img/10_sks dog/0.jpg", "img/10_sks dog/1.jpg", *(f"reg/1_dog/{number}.jpg" for number in range(3)))
    source = read_source(str(folder_of(files, tmp_path)), "folder")
    assert {record.image.name: list(record.captions) for record in source.records} == {
        "0.jpg": ["sks dog"],
        "1.jpg": ["sks dog"],
    }
    assert (
        source.layout.endswith("folder's name; the 3 for regularisation in reg/ are left out)") and source.samples == 2
    )
    alone = read_source(str(tmp_path / "reg"), "folder")  # asked for by name
    assert {record.captions for record in alone.records} == {("dog",)}


def test_the_folder_that_was_given_is_no_caption_whatever_it_is_called(tmp_path):
    source = read_source(str(folder_of(images("0.jpg", "1.jpg") | {"0.txt": "a"}, tmp_path / "01_raw")), "folder")
    assert {record.image.name: list(record.captions) for record in source.records} == {"0.jpg": ["a"], "1.jpg": []}
    assert source.layout == "folder of images"


def test_pictures_that_cannot_be_decoded_are_counted_with_the_reason(tmp_path):
    captions = {f"{number}.txt": "a" for number in range(3)}
    files = {"0.jpg": JPEG, "1.heic": HEIC, "2.avif": HEIC, **captions}
    source = read_source(str(folder_of(files, tmp_path / "photos")), "folder")
    index = write_shards(source.records, tmp_path / "shards", name="x", settings=ShardSettings(min_side=8), workers=1)
    assert index["skipped"] == {"undecodable": 2}
    skipped = (tmp_path / "shards" / "skipped.csv").read_text()
    assert re.search(r"1\.heic,undecodable,.*none of JPEG, PNG", skipped) and "2.avif" in skipped


def test_of_two_images_with_one_name_the_one_less_deep_is_meant(tmp_path: Path):
    for place in ("Images/0.jpg", "Images/thumbs/0.jpg", "a/b/c/0.jpg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(JPEG)
    contents = Contents.of(tmp_path)
    assert contents.image("0.jpg", tmp_path / "captions.txt") == tmp_path / "Images" / "0.jpg"
    assert contents.image("b/c/0.jpg", tmp_path / "captions.txt") == tmp_path / "a" / "b" / "c" / "0.jpg"
