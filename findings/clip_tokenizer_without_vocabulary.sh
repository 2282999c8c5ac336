#!/usr/bin/env bash
# transformers 5.24.0: a CLIP tokenizer without its vocabulary loads, and every text of a length becomes the same tokens.
#
# A pipeline's tokenizer/ folder that was copied in part (tokenizer_config.json, but neither vocab.json and merges.txt nor
# tokenizer.json) is refused by transformers 4.57.1. In transformers 5 CLIPTokenizer.from_pretrained makes a new tokenizer of
# the special tokens alone, two of them, and says nothing. A caption then becomes one unknown token a letter, whose id, 2,
# lies outside that vocabulary of two: "a dog" and "a cat" are the same to a text encoder, whose embedding table of 49,408
# rows takes the id without complaint. So a Stable Diffusion model draws the same picture for all prompts of a length, and
# a LoRA trains on it without an error.
#
# Output seen (transformers 5.24.0, tokenizers as it asks for, Python 3.11, Linux, 2026-11-27):
#   vocabulary of 2
#   a dog [0, 2, 2, 2, 2, 2]
#   a cat [0, 2, 2, 2, 2, 2]
#   x yz [0, 2, 2, 2, 2]
# What helps: compare len(tokenizer) with the text encoder's config.vocab_size before using either.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0

mkdir "$folder/tokenizer"
echo '{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}' > "$folder/tokenizer/tokenizer_config.json"

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/tokenizer" <<'PYTHON'
import sys

from transformers import CLIPTokenizer

tokenizer = CLIPTokenizer.from_pretrained(sys.argv[1])
texts = ["a dog", "a cat", "x yz"]
tokens = {text: tokenizer(text).input_ids for text in texts}
print("vocabulary of", len(tokenizer))
for text, ids in tokens.items():
    print(text, ids)
assert len(tokenizer) == 2, "no longer made of the special tokens alone"
assert tokens["a dog"] == tokens["a cat"], "different words are different tokens now"
PYTHON
