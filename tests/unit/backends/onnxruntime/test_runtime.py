"""What is looked at before and after ONNX Runtime opens a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora2edge.backends.onnxruntime import runtime as runtime_module
from lora2edge.backends.onnxruntime.model_file import read_model_file
from lora2edge.backends.onnxruntime.runtime import (
    check_files,
    load_runtime,
    open_model,
    refuse_cpu_nodes,
)
from lora2edge.errors import InputError, MissingExtraError, UnsupportedError

onnx = pytest.importorskip("onnx")


def opened(folder: Path, device: str = "cpu"):
    return open_model(folder, device=device, threads=1)


def test_where_each_node_runs_is_recorded(decoder: Path) -> None:
    found = opened(decoder)
    assert set(found.nodes) == {"CPUExecutionProvider"}
    assert found.nodes["CPUExecutionProvider"]["GroupQueryAttention"] == 2
    total = sum(found.nodes["CPUExecutionProvider"].values())
    assert f"CPUExecutionProvider runs {total} nodes" in found.build
    assert found.versions["onnxruntime"] == load_runtime().__version__


def test_nothing_is_printed(decoder: Path, without_cuda: None, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime would warn of the input that has a default."""
    opened(decoder)
    with pytest.raises(UnsupportedError):
        opened(decoder, "cuda")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_cuda_on_a_cpu_build_says_what_is_installed(decoder: Path, without_cuda: None) -> None:
    with pytest.raises(UnsupportedError) as caught:
        opened(decoder, "cuda")
    assert caught.value.code == "no-provider"
    assert "CPUExecutionProvider" in caught.value.why and load_runtime().__version__ in caught.value.what
    assert "pip install 'lora2edge[onnxruntime-gpu]'" in caught.value.hint


def test_a_session_that_fell_back_to_the_cpu_is_refused(decoder: Path, monkeypatch) -> None:
    """A GPU build whose CUDA libraries are missing gives a CPU session, with no more than a log line."""
    real = load_runtime()

    class Fallen(real.InferenceSession):
        def __init__(self, path, options, providers, **given):
            assert providers[0] == "CUDAExecutionProvider"
            super().__init__(path, options, providers=["CPUExecutionProvider"], **given)

    fake = SimpleNamespace(
        **{name: getattr(real, name) for name in ("SessionOptions", "__version__", "__file__", "get_build_info")},
        InferenceSession=Fallen,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        preload_dlls=lambda: print("Failed to load libcublas"),
        cuda_version="13.0",
    )
    monkeypatch.setattr(runtime_module, "load_runtime", lambda: fake)
    with pytest.raises(UnsupportedError) as caught:
        opened(decoder, "cuda")
    assert caught.value.code == "no-provider" and "providers_cuda" in caught.value.why


def test_compute_nodes_on_the_cpu_are_refused_by_name(decoder: Path) -> None:
    """The division of the graph as ONNX Runtime gives it, with one product, or none, left to the CPU."""
    integers = read_model_file(decoder / "model.onnx").integer_nodes
    model = onnx.load(decoder / "model.onnx", load_external_data=False)
    nodes = [(node.name, node.op_type) for node in model.graph.node]
    shapes = [node for node in nodes if node[0] in integers]
    compute = [node for node in nodes if node[0] not in integers]
    assert {"Shape", "ReduceSum"} <= {kind for _, kind in shapes}
    kinds = {kind for _, kind in compute}
    assert {"GroupQueryAttention", "FusedMatMul", "Sigmoid", "SkipSimplifiedLayerNormalization"} <= kinds
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    refuse_cpu_nodes({cuda: compute, cpu: shapes}, integers)
    for left in (compute[0], next(node for node in compute if node[1] == "Mul")):
        with pytest.raises(UnsupportedError) as caught:
            refuse_cpu_nodes({cuda: [n for n in compute if n != left], cpu: [*shapes, left]}, integers)
        assert caught.value.code == "cpu-nodes" and left[0] in caught.value.what and left[1] in caught.value.what
    with pytest.raises(UnsupportedError):
        refuse_cpu_nodes({cpu: shapes}, integers)


def test_floats_are_never_taken_for_shapes(decoder: Path) -> None:
    """What a Cast makes floats of, and everything after it, is computing."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Cast", ["s"], ["f"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "f"], ["g"], name="mul"),
        helper.make_node("Cast", ["s"], ["i"], name="narrow", to=TensorProto.INT32),
        helper.make_node("Add", ["i", "i"], ["j"], name="add"),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    out = helper.make_tensor_value_info("g", TensorProto.FLOAT, ["n"])
    path = decoder.parent / "shapes.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "shapes", [value], [out])), path)
    assert read_model_file(path).integer_nodes == {"shape", "cast", "narrow", "add"}


def test_the_external_entries_are_those_of_the_onnx_package(int4_decoder: Path) -> None:
    model = onnx.load(int4_decoder / "model.onnx", load_external_data=False)
    entries = [{e.key: e.value for e in tensor.external_data} for tensor in model.graph.initializer]
    ends = [int(entry["offset"]) + int(entry["length"]) for entry in entries if entry]
    (found,) = read_model_file(int4_decoder / "model.onnx").externals
    assert (found.location, found.size_bytes) == ("model.onnx.data", max(ends))
    assert found.size_bytes == (int4_decoder / "model.onnx.data").stat().st_size


def truncated(folder: Path) -> tuple[str, ...]:
    data = folder / "model.onnx.data"
    size = data.stat().st_size
    os.truncate(data, size - 1)
    return f"{size:,}", f"{size - 1:,}"


def missing(folder: Path) -> tuple[str, ...]:
    (folder / "model.onnx.data").unlink()
    return ("is missing",)


def folder_instead(folder: Path) -> tuple[str, ...]:
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").mkdir()
    return ("is no file",)


def link_outside(folder: Path) -> tuple[str, ...]:
    outside = folder.parent / "blob"
    (folder / "model.onnx.data").rename(outside)
    (folder / "model.onnx.data").symlink_to(outside)
    return str(outside), "is a link"


def link_to_nowhere(folder: Path) -> tuple[str, ...]:
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").symlink_to("gone")
    return ("is no file",)


def named_outside(folder: Path) -> tuple[str, ...]:
    (folder / "model.onnx.data").rename(folder.parent / "model.onnx.data")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    onnx.save(model, folder / "model.onnx")
    return ("outside the model's folder",)


@pytest.mark.parametrize("damage", [truncated, missing, folder_instead, link_outside, link_to_nowhere, named_outside])
def test_external_data_that_is_not_whole(int4_copy: Path, damage: Callable[[Path], tuple[str, ...]]) -> None:
    words = damage(int4_copy)
    with pytest.raises(InputError) as caught:
        opened(int4_copy)
    assert caught.value.code == "external-data"
    assert all(word in caught.value.what for word in words)
    assert caught.value.hint


def test_a_link_inside_the_folder_and_a_moved_folder_are_fine(int4_copy: Path, tmp_path: Path, monkeypatch) -> None:
    (int4_copy / "model.onnx.data").rename(int4_copy / "weights")
    (int4_copy / "model.onnx.data").symlink_to("weights")
    moved = int4_copy.rename(tmp_path / "moved")
    link = tmp_path / "link"
    link.symlink_to(moved)
    monkeypatch.chdir("/")
    assert opened(moved).session and opened(link).session


@pytest.mark.parametrize("keep", [0, 1, 100, 3000])
def test_a_model_file_that_is_cut_off(int4_copy: Path, keep: int) -> None:
    os.truncate(int4_copy / "model.onnx", keep)
    with pytest.raises(InputError) as caught:
        opened(int4_copy)
    assert caught.value.code == "broken-model" and "model.onnx" in caught.value.what


def test_random_bytes_are_no_model(tmp_path: Path) -> None:
    import random

    generator = random.Random(0)
    for length in (1, 10, 1000):
        (tmp_path / "model.onnx").write_bytes(generator.randbytes(length))
        with pytest.raises(InputError) as caught:
            check_files(tmp_path)
        assert caught.value.code == "broken-model"
    with pytest.raises(InputError):
        check_files(tmp_path / "nowhere")


def test_without_the_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError) as caught:
        load_runtime()
    assert caught.value.code == "missing-extra" and caught.value.hint == "pip install 'lora2edge[onnxruntime]'"


def test_with_an_empty_package(monkeypatch) -> None:
    """What `pip uninstall` of one of two builds leaves behind."""
    monkeypatch.setitem(sys.modules, "onnxruntime", type(sys)("onnxruntime"))
    with pytest.raises(MissingExtraError) as caught:
        load_runtime()
    assert caught.value.code == "broken-extra"


def test_an_unknown_device(decoder: Path) -> None:
    with pytest.raises(InputError) as caught:
        opened(decoder, "npu")
    assert caught.value.code == "device"
