"""Pipelines are written so that programs with transformers before version 5 read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from helpers.pipelines import TINY_TEXT, TINY_XL_TEXT_2, build_tiny_pipeline
from lcm_lightning.models.architectures import clip_tokenizer
from lcm_lightning.models.older_readers import add_for_older_readers
from lcm_lightning.models.stable_diffusion import load_stable_diffusion
from lcm_lightning.models.variants import save_whole

PROMPT = "Two dogs, an étude & 42 cats!"


def test_vocabulary_and_merges_lie_beside_the_tokenizer(tmp_path: Path):
    tokenizer = clip_tokenizer("<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    add_for_older_readers(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()  # all that transformers 4 does not open
    older = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert older(PROMPT).input_ids == tokenizer(PROMPT).input_ids
    assert json.loads((tmp_path / "tokenizer" / "vocab.json").read_text()) == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("folder", "kind", "config"),
    [
        ("text_encoder", CLIPTextModel, TINY_TEXT),
        ("text_encoder_2", CLIPTextModelWithProjection, TINY_XL_TEXT_2),
    ],
)
def test_text_encoders_have_the_names_of_transformers_4(tmp_path: Path, folder: str, kind: type, config: dict):
    network = kind(CLIPTextConfig(**config)).eval()
    network.save_pretrained(tmp_path / folder)
    add_for_older_readers(tmp_path)
    names = set(load_file(tmp_path / folder / "model.safetensors"))
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
    again = kind.from_pretrained(tmp_path / folder).eval()
    tokens = torch.tensor([[512, 3, 4, 513]])
    torch.testing.assert_close(again(tokens)[0], network(tokens)[0], atol=1e-5, rtol=0)


def test_a_pipeline_s_folder_is_written_so_and_still_ours(tmp_path: Path):
    save_whole(build_tiny_pipeline(), tmp_path)
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {file.name for file in (tmp_path / "tokenizer").iterdir()}
    model = load_stable_diffusion(str(tmp_path))
    assert model.encode_text([PROMPT]).text.isfinite().all()
