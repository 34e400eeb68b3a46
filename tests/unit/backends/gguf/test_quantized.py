"""The quantized file: its bytes against gguf-py's own rounding, its damage, its importance matrix."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.gguf import GgufBackend
from lora2edge.backends.gguf.mix import FILE_TYPES
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import ChannelStats, Checkpoint, Machine
from lora2edge.errors import InputError
from lora2edge.progress import SILENT
from tests.tiny import make_adapter, make_checkpoint
from tests.unit.backends.gguf.lowering import RandomStatistics, divergence, lower, target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("quantized")
    base = make_checkpoint(root / "base", "llama", hidden=256, heads=8, kv_heads=4, intermediate=512)
    return base, make_adapter(root / "adapter", base)


@pytest.fixture(scope="module")
def merged(folders: tuple[Path, Path]) -> Checkpoint:
    base, adapter = folders
    return merge(open_checkpoint(base), [read_adapter(str(adapter))])


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a query or key projection: within each head, row i beside row i + half."""
    half = len(rows) // heads // 2
    order = [head * 2 * half + i + part * half for head in range(heads) for i in range(half) for part in range(2)]
    return rows[order]


@pytest.mark.parametrize("precision", ["q8_0", "q4_0", "bf16"])
def test_bytes_are_those_of_gguf_py(merged: Checkpoint, precision: str, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, quants

    lower(merged, tmp_path / "out", precision)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    for name, source, heads in (
        ("blk.0.attn_q.weight", "self_attn.q_proj", 8),
        ("blk.0.attn_k.weight", "self_attn.k_proj", 4),
        ("blk.0.ffn_down.weight", "mlp.down_proj", 0),
    ):
        stored = f"model.layers.0.{source}.weight"
        rows = merged.rows(stored, 0, merged.tensors[stored].shape[0])
        rows = interleaved(rows, heads) if heads else rows
        expected = quants.quantize(rows, GGMLQuantizationType[precision.upper()])
        assert tensors[name].tensor_type.name == precision.upper()
        assert np.array_equal(tensors[name].data.view(np.uint8).reshape(-1), expected.view(np.uint8).reshape(-1))


# Random weights lose far more than trained ones; a wrong type, offset or order gives 4 and more.
BOUNDS = {
    "f16": 1e-4,
    "bf16": 1e-4,
    "q8_0": 1e-2,
    "q6_k": 0.03,
    "q5_k_m": 0.1,
    "q4_k_m": 0.4,
    "q4_0": 0.4,
    "iq4_xs": 0.4,
    "q3_k_m": 1.0,
    "q2_k": 3.0,
}


@pytest.mark.parametrize("precision", BOUNDS)
def test_every_file_type_loads_and_answers(folders: tuple[Path, Path], precision: str, tmp_path: Path) -> None:
    base = open_checkpoint(folders[0])
    lower(base, tmp_path / "out", precision, RandomStatistics(base) if FILE_TYPES[precision.upper()].imatrix else None)
    assert divergence(folders[0], tmp_path / "out", length=64) < BOUNDS[precision]


def test_one_checkpoint_gives_one_file(merged: Checkpoint, tmp_path: Path) -> None:
    hashes = set()
    for name in ("one", "two"):
        lower(merged, tmp_path / name, "q4_k_m", RandomStatistics(merged))
        hashes.add(tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / name).iterdir())))
    assert len(hashes) == 1
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["imatrix.gguf", "model.gguf"]


def test_the_importance_matrix_changes_rounding_and_is_written(merged: Checkpoint, tmp_path: Path) -> None:
    from gguf import GGUFReader

    statistics = RandomStatistics(merged)
    with_matrix = lower(merged, tmp_path / "with", "q4_k_m", statistics)
    without = lower(merged, tmp_path / "without", "q4_k_m", statistics, imatrix=False)
    assert with_matrix.notes["imatrix"] == {"covered": 14, "without": ["token_embd.weight"]}
    assert without.notes["imatrix"]["covered"] == 0
    assert (tmp_path / "with" / "model.gguf").read_bytes() != (tmp_path / "without" / "model.gguf").read_bytes()
    stored = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "with" / "imatrix.gguf").tensors}
    expected = statistics.vectors("model.layers.1.mlp.up_proj.weight")
    assert stored["blk.1.ffn_up.weight.counts"].item() == expected.count
    assert np.allclose(stored["blk.1.ffn_up.weight.in_sum2"][0] / expected.count, expected.mean_square, rtol=1e-6)


def test_importance_lowers_the_weighted_error(merged: Checkpoint, tmp_path: Path) -> None:
    from gguf import GGUFReader, quants

    statistics = RandomStatistics(merged)
    name = "model.layers.1.mlp.up_proj.weight"
    rows = merged.rows(name, 0, merged.tensors[name].shape[0])
    errors = []
    for imatrix in (True, False):
        lower(merged, tmp_path / str(imatrix), "q4_k_m", statistics, imatrix=imatrix)
        reader = GGUFReader(tmp_path / str(imatrix) / "model.gguf")
        tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight")
        found = quants.dequantize(tensor.data, tensor.tensor_type)
        errors.append(float(((found - rows) ** 2 * statistics.vectors(name).mean_square).sum()))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("stats", "code"),
    [
        (None, "imatrix-missing"),
        (ChannelStats(np.zeros(512, np.float32), 10), "imatrix-values"),
        (ChannelStats(np.full(512, np.nan, np.float32), 10), "imatrix-values"),
        (ChannelStats(np.ones(512, np.float32), 0), "imatrix-values"),
        (ChannelStats(np.ones(511, np.float32), 10), "imatrix-values"),
    ],
)
def test_gaps_in_the_statistics_are_errors(
    merged: Checkpoint, stats: ChannelStats | None, code: str, tmp_path: Path
) -> None:
    statistics = RandomStatistics(merged)
    name = "model.layers.0.mlp.down_proj.weight"
    del statistics.by_name[name]
    if stats:
        statistics.by_name[name] = stats
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as caught:
        lower(merged, tmp_path / "out", "q4_k_m", statistics)
    assert caught.value.code == code


def test_an_importance_matrix_needs_text(merged: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        lower(merged, tmp_path / "out", "q4_k_m", None, imatrix=True)
    assert caught.value.code == "imatrix-without-data"
    assert lower(merged, tmp_path / "plain", "q4_k_m").notes["imatrix"] == {"covered": 0, "why": "no calibration text"}


def test_damage_is_what_gguf_py_reads_back(merged: Checkpoint, tmp_path: Path) -> None:
    from gguf import GGUFReader, quants

    lower(merged, tmp_path / "out", "q4_k_m")
    damage = {entry.name: entry for entry in GgufBackend().damage(merged, tmp_path / "out", SILENT)}
    assert set(damage) == {name for name, tensor in merged.tensors.items() if len(tensor.shape) == 2}
    name = "model.layers.1.self_attn.q_proj.weight"
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.attn_q.weight")
    found = quants.dequantize(tensor.data, tensor.tensor_type)
    rows, delta = merged.rows(name, 0, 256), merged.delta(name, 0, 256)
    assert delta is not None
    rows, delta = interleaved(rows, 8), interleaved(delta, 8)
    entry = damage[name]
    assert (entry.type, entry.layer) == (tensor.tensor_type.name, 1)
    assert entry.relative_error == pytest.approx(np.linalg.norm(found - rows) / np.linalg.norm(rows), rel=1e-5)
    kept = float(((found - (rows - delta)) * delta).sum() / (delta**2).sum())
    assert entry.delta_kept == pytest.approx(kept, rel=1e-4)
    assert entry.delta_noise == pytest.approx(np.linalg.norm(found - rows) / np.linalg.norm(delta), rel=1e-5)
    assert damage["model.embed_tokens.weight"].delta_kept is None


def test_the_estimate_names_the_size(merged: Checkpoint, tmp_path: Path) -> None:
    machine = Machine(cores=2, ram_bytes=8 << 30, disk_bytes=8 << 30, cuda=None)
    estimate = GgufBackend().check(merged, target("q8_0"), machine)
    lower(merged, tmp_path / "out", "q8_0")
    size = (tmp_path / "out" / "model.gguf").stat().st_size
    assert size * 0.9 < estimate.disk_bytes < size * 1.3
    assert estimate.ram_bytes > 1 << 20
    assert estimate.seconds > 0


def test_a_width_that_256_does_not_divide_is_told(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "hf", "qwen2", hidden=96, intermediate=160))
    lowered = lower(checkpoint, tmp_path / "out", "q4_k_m")
    assert lowered.notes["tensor_types"].keys() == {"F32", "Q5_0", "Q8_0"}
    assert any("256 does not divide" in note for note in lowered.notes["notes"])


def test_doctor_names_the_library() -> None:
    health = GgufBackend().doctor()
    assert health.works
    assert "llama.cpp" in health.detail
