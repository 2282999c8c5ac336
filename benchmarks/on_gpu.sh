#!/bin/sh
# Evidence from one NVIDIA GPU, within minutes and without a network:
#
#     benchmarks/on_gpu.sh WHEELS PEER_SCRIPT OUT [--seconds 520] [--device cpu --tiny] [--parts NAME,NAME]
#
# WHEELS is a folder that benchmarks/pack_for_gpu.sh makes, PEER_SCRIPT diffusers' train_lcm_distill_lora_sd_wds.py. OUT gets
# gpu.json, gpu.md and gpu.log, written anew after each measurement. PYTHON names an interpreter with torch, torchvision,
# transformers, lightning, torchmetrics and accelerate; it stays as it is: what else is needed is installed beside it.
set -eu

if [ $# -lt 3 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
began=$(date +%s)
root=$(cd "$(dirname "$0")/.." && pwd)
wheels=$(cd "$1" && pwd) peer=$(realpath "$2")
mkdir -p "$3"
out=$(cd "$3" && pwd)
shift 3
python=${PYTHON:-python3} work=${WORK:-/tmp/lcm_on_gpu} seconds=520
commit=$(cat "$wheels/commit.txt" 2>/dev/null || echo)

# --seconds is counted from here, not from when Python has started.
previous=
for argument; do
    case $previous$argument in
    --seconds[0-9]*) seconds=$argument ;;
    *--seconds=*) seconds=${argument#*=} ;;
    esac
    previous=$argument
done

# Not into a virtual environment: where `python` is in one itself, a new one would not see what that has.
rm -rf "$work/site"
mkdir -p "$work/site"
"$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check --target "$work/site" \
    --find-links "$wheels" -r "$root/benchmarks/on_gpu_requirements.txt"
export PYTHONPATH="$work/site:$root"
cd "$root"
left=$((seconds - $(date +%s) + began))
exec timeout --kill-after=5 "$left" "$python" -m benchmarks.on_gpu run "$peer" "$out" --work "$work" --commit "$commit" \
    "$@" --seconds "$left"
