#!/bin/sh
# Builds llama.cpp's own tools (llama-quantize, llama-imatrix, llama-perplexity, llama-bench): the peers that the
# tests marked `peer` and the benchmark suites compare with. Needs g++, cmake and a Python with pip.
#
#   benchmarks/build_peers.sh OUT [PYTHON]
#   LLAMA_CPP_TOOLS=OUT pytest -m peer
#
# The libraries come from llama-cpp-python's source distribution, compiled for this machine's CPU (about ten CPU minutes
# where PYTHON has not installed it yet); the tools are compiled from the same sources and linked to them (half a minute).
set -eu

version=0.3.36
if [ $# -lt 1 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${2:-python3}
jobs=${JOBS:-$(nproc)}

installed=$("$python" -c 'import importlib.metadata as m; print(m.version("llama-cpp-python"))' 2>/dev/null || true)
if [ "$installed" != "$version" ]; then
    CMAKE_BUILD_PARALLEL_LEVEL=$jobs CMAKE_ARGS=-DGGML_NATIVE=ON \
        "$python" -m pip install --no-deps --no-binary llama-cpp-python "llama-cpp-python==$version"
fi
libraries=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lib

sources=$out/sources/llama_cpp_python-$version/vendor/llama.cpp
if [ ! -d "$sources" ]; then
    mkdir -p "$out/sources"
    "$python" -m pip download --no-deps --no-binary llama-cpp-python --dest "$out/sources" \
        "llama-cpp-python==$version" >/dev/null
    tar -xzf "$out/sources/llama_cpp_python-$version.tar.gz" -C "$out/sources"
fi

for tool in quantize imatrix perplexity llama-bench; do
    name=llama-${tool#llama-}
    echo "$name"
    # DT_RPATH, not RUNPATH: the libraries need each other, and have no path of their own.
    g++ -O3 -std=gnu++17 -I"$sources/include" -I"$sources/ggml/include" -I"$sources/common" -I"$sources/vendor" \
        -I"$sources/src" "$sources"/tools/"$tool"/*.cpp -o "$out/$name" -L"$libraries" -lllama-common -lllama -lggml \
        -lggml-base -lggml-cpu -Wl,--disable-new-dtags -Wl,-rpath,"$libraries" -lpthread
done
