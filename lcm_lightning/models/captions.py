"""Captions as tokens, in chunks that CLIP's text encoder has positions for; none is cut inside a word."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from lcm_lightning.errors import short

log = logging.getLogger(__name__)

MARKS = 2  # begin and end of each chunk
WORD_END = "</w>"  # of the last token of a word, in CLIP's vocabulary
TOLD: list[str] = []  # the caption of which this process has said that it is cut


def split_captions(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[list[list[int]]]:
    """Of each caption the ids of its words, without begin and end, in chunks of at most `room` tokens.

    A chunk ends where the next word has no room; only a word longer than a whole chunk is divided. An empty caption is
    one empty chunk.
    """
    every = tokenizer(list(captions), add_special_tokens=False, truncation=False, verbose=False).input_ids
    return [[ids] if len(ids) <= room(tokenizer) else _chunks(tokenizer, ids) for ids in every]


def room(tokenizer: CLIPTokenizer) -> int:
    """Tokens of a caption that one chunk holds: 75 of SD's and SDXL's text encoders."""
    return tokenizer.model_max_length - MARKS


def _chunks(tokenizer: CLIPTokenizer, ids: Sequence[int]) -> list[list[int]]:
    chunks: list[list[int]] = [[]]
    for word in _words(tokenizer, ids):
        pieces = [word] if len(word) <= room(tokenizer) else [[token] for token in word]
        for piece in pieces:
            if len(chunks[-1]) + len(piece) > room(tokenizer):
                chunks.append([])
            chunks[-1] += piece
    return chunks


def _words(tokenizer: CLIPTokenizer, ids: Sequence[int]) -> list[list[int]]:
    words: list[list[int]] = [[]]
    special = set(tokenizer.all_special_ids)
    for token, text in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        words[-1].append(token)
        if text.endswith(WORD_END) or token in special:
            words.append([])
    return words if words[-1] else words[:-1]


def padded_ids(tokenizer: CLIPTokenizer, captions: Sequence[Sequence[Sequence[int]]], number: int) -> Tensor:
    """Ids [B * `number`, L] of the first `number` chunks of each of B split captions, one caption after the other.

    Each chunk has its own begin and end. Captions with fewer are followed by chunks of the empty caption.
    """
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for chunks in captions:
        for chunk in (*chunks[:number], *[[]] * (number - len(chunks))):
            rows.append([begin, *chunk, end, *[pad] * (room(tokenizer) - len(chunk))])
    return torch.tensor(rows)


def tell_of_cut(tokenizer: CLIPTokenizer, caption: str, chunks: Sequence[Sequence[int]], number: int) -> None:
    """Warn, once in a process, of a caption that has more than `number` chunks, with what would read all of it."""
    if TOLD:
        return
    TOLD.append(caption)
    log.warning(
        "a caption of %d tokens is cut to its first words, of %d tokens at most, as all that are longer: %r; "
        "shorten it, or read more of captions with model.prompt_chunks=%d",
        sum(map(len, chunks)),
        number * room(tokenizer),
        short(caption, 80),
        len(chunks),
    )
