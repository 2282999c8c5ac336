#!/usr/bin/env bash
# safetensors 0.8.0: equal tensors with equal metadata are other bytes each time they are written.
#
# save() keeps the entries of the header's `__metadata__` in the order of a hash map whose seed is drawn anew for each map.
# With two entries or more the file of one and the same dict differs from process to process, and from call to call in one.
# Its length and its tensors do not. So a digest of a LoRA file (kohya and diffusers write five entries and more) says nothing
# about its weights: exact resumes look inexact, content-addressed stores and git LFS keep a copy for each time a script runs,
# and a cache keyed by the file's hash is never hit. Without metadata, or with one entry, the bytes are the same each time.
#
# Output seen (safetensors 0.8.0, numpy 2.4.6, Python 3.11, Linux, 2026-11-27; two of 20 may be alike by chance, of 720 orders):
#   6 entries, 20 processes: 20 different files, all of 392 bytes
#   6 entries, 20 calls in one process: 19 different files
#   1 entry, 20 processes: 1 file
#   no entry, 20 processes: 1 file
# What helps: hash the tensors (safe_open) instead of the file, or write the header's entries in sorted order again.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6

cat > "$folder/save.py" <<'PYTHON'
import hashlib
import sys

import numpy as np
from safetensors.numpy import save

entries, calls = map(int, sys.argv[1:])
weights = {"down": np.arange(16, dtype=np.float32), "up": np.ones(16, np.float32)}
metadata = {f"entry_{number}": "a value" for number in range(entries)} or None
for _ in range(calls):
    written = save(weights, metadata)
    print(len(written), hashlib.sha256(written).hexdigest())
PYTHON

different() { sort -u | wc -l; }
processes() { for _ in $(seq 20); do "$folder/venv/bin/python" "$folder/save.py" "$1" 1; done; }

processes 6 > "$folder/six"
many=$(different < "$folder/six")
echo "6 entries, 20 processes: $many different files, all of $(cut -d' ' -f1 "$folder/six" | sort -u) bytes"
calls=$("$folder/venv/bin/python" "$folder/save.py" 6 20 | different)
echo "6 entries, 20 calls in one process: $calls different files"
one=$(processes 1 | different)
echo "1 entry, 20 processes: $one file"
none=$(processes 0 | different)
echo "no entry, 20 processes: $none file"
[ "$many" -gt 1 ] && [ "$calls" -gt 1 ] && [ "$one" = 1 ] && [ "$none" = 1 ]
