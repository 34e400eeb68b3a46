"""Finding, loading and guarding llama.cpp; ggml's rounding against the gguf library's own."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from lora2edge.backends.gguf import llama_cpp
from lora2edge.backends.gguf.llama_cpp import Library, load_library
from lora2edge.errors import MissingExtraError, UnsupportedError


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library()


def test_one_library_is_loaded_once(library: Library) -> None:
    assert load_library() is library
    assert load_library(library.kind) is library


def test_facts_name_the_build(library: Library) -> None:
    assert library.facts["library"] in {"xllamacpp", "llama-cpp-python"}
    assert library.facts["llama_cpp"] in llama_cpp.CONTEXT_LAYOUTS
    assert library.facts["build"].startswith(library.kind + " (")
    assert "AVX2 = 1" in library.facts["system_info"] or "NEON = 1" in library.facts["system_info"]


def test_a_second_build_in_one_process_is_refused(library: Library) -> None:
    other = "native" if library.kind == "prebuilt" else "prebuilt"
    with pytest.raises(UnsupportedError) as caught:
        load_library(other)
    assert caught.value.code == "two-llama-libraries"
    assert library.kind in caught.value.hint


def test_loading_imports_neither_package(library: Library) -> None:
    code = (
        "import sys; from lora2edge.backends.gguf.llama_cpp import load_library; load_library();"
        "print([name for name in ('xllamacpp', 'llama_cpp', 'gguf', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0"])
def test_quantize_chunk_gives_the_gguf_librarys_bytes(library: Library, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    weights = np.random.default_rng(0).standard_normal((7, 256)).astype(np.float32)
    expected = gguf.quants.quantize(weights, kind)
    found = np.zeros_like(expected)
    src, dst = weights.ctypes.data, found.ctypes.data
    written = library.quantize_chunk(int(kind), src, dst, 0, 4, 256, None)
    written += library.quantize_chunk(int(kind), src, dst, 4, 3, 256, None)
    assert written == expected.nbytes
    np.testing.assert_array_equal(found, expected)


def test_quantize_chunk_uses_the_importance_matrix(library: Library) -> None:
    kind = int(gguf.GGMLQuantizationType.Q4_K)
    weights = np.random.default_rng(1).standard_normal((4, 512)).astype(np.float32)
    importance = np.ones(512, np.float32)
    importance[::16] = 1000
    rows = []
    for address in (None, importance.ctypes.data):
        out = np.zeros((4, 512 // 256 * 144), np.uint8)
        library.quantize_chunk(kind, weights.ctypes.data, out.ctypes.data, 0, 4, 512, address)
        rows.append(gguf.quants.dequantize(out, gguf.GGMLQuantizationType.Q4_K))
    error = [np.square(row - weights)[:, ::16].mean() for row in rows]
    assert error[1] < 0.5 * error[0]


def test_what_would_end_the_process_is_refused(library: Library) -> None:
    data = np.zeros(512, np.float32)
    with pytest.raises(UnsupportedError) as caught:
        library.quantize_chunk(int(gguf.GGMLQuantizationType.Q4_K), data.ctypes.data, data.ctypes.data, 0, 1, 96, None)
    assert caught.value.code == "block-size"
    assert "96" in caught.value.what and "256" in caught.value.what
    with pytest.raises(UnsupportedError) as caught:
        library.quantize_chunk(
            int(gguf.GGMLQuantizationType.IQ2_XXS), data.ctypes.data, data.ctypes.data, 0, 1, 256, None
        )
    assert caught.value.code == "imatrix-needed"


def test_the_wrong_layout_shows_in_the_defaults(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other version's layout on this library: no call fails, and the guard sees it."""
    layouts = dict(llama_cpp.CONTEXT_LAYOUTS)
    own = library.facts["llama_cpp"]
    (other,) = [layout for version, layout in layouts.items() if version != own]
    monkeypatch.setattr(llama_cpp, "CONTEXT_LAYOUTS", {own: other})
    package = llama_cpp._PACKAGES[library.kind]
    with pytest.raises(UnsupportedError) as caught:
        Library(package, library.path)
    assert caught.value.code == "llama-layout"
    assert package.pin in caught.value.hint


def test_an_unknown_version_names_the_known_ones(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "CONTEXT_LAYOUTS", {})
    with pytest.raises(UnsupportedError) as caught:
        Library(llama_cpp._PACKAGES[library.kind], library.path)
    assert caught.value.code == "llama-version"
    assert library.facts["llama_cpp"] in caught.value.what
    assert "0.5.0-dev" in caught.value.why and "0.6.0-dev" in caught.value.why


def test_nothing_installed_is_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "_loaded", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        load_library()
    assert caught.value.code == "missing-extra"
    assert caught.value.hint == "pip install 'lora2edge[gguf]'"


@pytest.mark.parametrize("content", [None, b"not a shared library"])
def test_a_broken_install_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "xllamacpp.abi3.so").write_bytes(content)
    spec = importlib.machinery.ModuleSpec("xllamacpp", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(llama_cpp, "_loaded", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(MissingExtraError) as caught:
        load_library("prebuilt")
    assert caught.value.code == "broken-extra"
    assert "--force-reinstall" in caught.value.hint


def test_a_foreign_library_is_a_broken_install(tmp_path: Path) -> None:
    """A shared library without llama.cpp's functions: the C library stands in."""
    package = llama_cpp._PACKAGES["prebuilt"]
    with pytest.raises(MissingExtraError) as caught:
        llama_cpp._declare(ctypes.CDLL(None), package)
    assert "llama_version" in caught.value.why


def test_errors_are_kept_and_nothing_is_printed(library: Library, capfd: pytest.CaptureFixture[str]) -> None:
    library.take_errors()
    params = library.c.llama_model_default_params()
    assert not library.c.llama_model_load_from_file(b"/nowhere/model.gguf", params)
    assert "/nowhere/model.gguf" in library.take_errors()
    assert library.take_errors() == ""
    assert capfd.readouterr() == ("", "")
