#!/bin/sh
# Put together what benchmarks/on_gpu.sh takes to a machine without a network, in build/gpu/:
#
#     benchmarks/pack_for_gpu.sh PEER_SCRIPT     wheels/, peer.py, and gpu.tar.gz: all of that and the clone without assets
#     benchmarks/pack_for_gpu.sh aside           move the assets (55 MB) out of the clone, where the clone itself travels
#     benchmarks/pack_for_gpu.sh back            and back in again
#
# There: tar xf gpu.tar.gz && benchmarks/on_gpu.sh build/gpu/wheels build/gpu/peer.py OUT
# PYTHON names the interpreter here whose pip fetches the wheels, PYTHON_THERE the version there (3.12).
set -eu

cd "$(dirname "$0")/.."
assets=lcm_lightning/assets build=build/gpu aside=build/gpu_aside/assets
python=${PYTHON:-python3} there=${PYTHON_THERE:-3.12} needs=benchmarks/on_gpu_requirements.txt

move() {
    if [ ! -d "$1" ] || [ -e "$2" ]; then
        echo "$1: not there, or $2 is: nothing was moved" >&2
        exit 2
    fi
    mkdir -p "$(dirname "$2")"
    mv "$1" "$2"
}

case ${1:-} in
aside) move "$assets" "$aside" && echo "assets are in $aside; $0 back brings them back" && exit ;;
back) move "$aside" "$assets" && exit ;;
esac
if [ ! -f "${1:-}" ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

mkdir -p "$build/wheels"
cp "$1" "$build/peer.py"
git describe --always --dirty >"$build/wheels/commit.txt"
# antlr4's release holds no wheel: one is built, which fits any Python.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$build/wheels" "$(grep ^antlr4 "$needs")"
grep -v '^antlr4' "$needs" >"$build/downloaded.txt"
platforms=
for number in 2014 _2_17 _2_28; do platforms="$platforms --platform manylinux${number}_x86_64"; done
# shellcheck disable=SC2086
"$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$there" $platforms \
    --dest "$build/wheels" -r "$build/downloaded.txt"
git ls-files -z -- . ":!$assets" ':!docs/results/*.png' | tar czf "$build/gpu.tar.gz" --null --files-from=- \
    "$build/wheels" "$build/peer.py"
du -sh "$build/wheels" "$build/gpu.tar.gz"
