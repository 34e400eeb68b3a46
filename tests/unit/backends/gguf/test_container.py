"""The file's frame against gguf-py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora2edge.backends.gguf.container import Metadata, padding, read_header, write_header
from lora2edge.backends.gguf.mix import TYPES
from lora2edge.errors import CheckpointError

METADATA: Metadata = {
    "general.architecture": ("str", "llama"),
    "a.count": ("u32", 7),
    "a.ratio": ("f32", 0.5),
    "a.flag": ("bool", True),
    "a.words": ("strings", ["x", "我想", ""]),
    "a.types": ("i32s", [1, -2, 3]),
    "a.scores": ("f32s", [0.25, -1e6]),
}


def test_gguf_py_reads_what_is_written(tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = tmp_path / "x.gguf"
    one, two = np.arange(15, dtype=np.float32).reshape(3, 5), np.arange(3, dtype=np.float32)
    with path.open("wb") as file:
        write_header(file, METADATA, [("one", "F32", one.shape), ("two", "F32", two.shape)])
        for values in (one, two):
            file.write(values.tobytes() + b"\0" * padding(values.nbytes))
    reader = GGUFReader(path)
    for key, (_, value) in METADATA.items():
        found = reader.fields[key].contents()
        assert found == pytest.approx(value) if key in {"a.ratio", "a.scores"} else found == value
    assert np.array_equal(reader.tensors[0].data, one)
    assert np.array_equal(reader.tensors[1].data, two)


def test_what_gguf_py_writes_is_read(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint64("a.big", 1 << 40)
    writer.add_array("a.words", ["x", "yy"])
    writer.add_array("a.numbers", [1, 2, 3])
    values = np.random.default_rng(0).random((4, 64), np.float32)
    writer.add_tensor("t.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = read_header(path)["t.weight"]
    assert (stored.type, stored.shape, stored.size_bytes) == ("F32", (4, 64), 1024)
    assert path.read_bytes()[stored.offset : stored.offset + 1024] == values.tobytes()


def test_types_are_those_of_gguf_py() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for item in TYPES.values():
        known = GGMLQuantizationType[item.name]
        assert (item.id, (item.block, item.size_bytes)) == (int(known), GGML_QUANT_SIZES[known])


@pytest.mark.parametrize("data", [b"", b"GGUF", b"PK\3\4" + b"\0" * 64, b"GGUF\3\0\0\0" + b"\xff" * 32])
def test_a_broken_file_is_said_to_be_one(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.code == "gguf-broken"
