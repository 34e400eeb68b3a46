"""Blocks of GGUF as grids, against the gguf library's dequantizers and llama.cpp's own."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora2edge.backends.gguf.blocks import GRID_TYPES, header_grid, read_codes, replace_codes
from lora2edge.backends.gguf.llama_cpp import Library, load_library
from lora2edge.backends.gguf.mix import TYPES, row_bytes

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
COLUMNS = 512
every_type = pytest.mark.parametrize("name", sorted(GRID_TYPES))


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library()


def quantized(library: Library, weights: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    rows, columns = weights.shape
    data = np.empty(rows * row_bytes(name, columns), np.uint8)
    address = None if importance is None else importance.ctypes.data
    library.quantize_chunk(TYPES[name].id, weights.ctypes.data, data.ctypes.data, 0, rows, columns, address)
    return data


def llama_cpp_values(library: Library, data: np.ndarray, name: str, size: int) -> np.ndarray:
    """Through the function that llama.cpp itself dequantizes with."""
    function = getattr(library.c, f"dequantize_row_{name.lower().replace('_k', '_K')}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    values = np.empty(size, np.float32)
    function(data.ctypes.data, values.ctypes.data, size)
    return values


def gguf_values(data: np.ndarray, name: str) -> np.ndarray:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])


def weights_of(seed: int, rows: int = 6) -> np.ndarray:
    """Rows of very different sizes, with outliers and a block of zeros."""
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((rows, COLUMNS)) * 10.0 ** generator.uniform(-6, 3, (rows, 1))
    weights[generator.random(weights.shape) < 0.01] *= 20
    weights[1, :256] = 0
    return np.clip(weights, -60000, 60000).astype(np.float32)


HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}


def random_bytes(name: str, seed: int, blocks: int = 8) -> np.ndarray:
    """Any bits, but of the halves only finite ones."""
    data = np.random.default_rng(seed).integers(0, 256, (blocks, TYPES[name].size_bytes), np.uint8)
    for half in HALVES[name]:
        data[:, half + 1] &= 0xBF
    return data.reshape(-1)


@every_type
@given(seed=st.integers(0, 2**32 - 1))
@few
def test_what_llama_cpp_wrote_is_read_as_llama_cpp_and_gguf_read_it(library: Library, name: str, seed: int) -> None:
    weights = weights_of(seed)
    data = quantized(library, weights, name, np.abs(weights_of(seed + 1)[:1]))
    grid, codes = header_grid(data, name, COLUMNS), read_codes(data, name, COLUMNS)
    values = grid.values(codes)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.reshape(-1), gguf_values(data, name).reshape(-1))
    np.testing.assert_array_equal(values.reshape(-1), llama_cpp_values(library, data, name, weights.size))
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high
    np.testing.assert_array_equal(replace_codes(data, name, codes), data)


@every_type
@given(seed=st.integers(0, 2**32 - 1))
@few
def test_any_bytes_go_through_and_back(library: Library, name: str, seed: int) -> None:
    data = random_bytes(name, seed)
    size = len(data) // TYPES[name].size_bytes * TYPES[name].block
    columns = TYPES[name].block
    codes = read_codes(data, name, columns)
    np.testing.assert_array_equal(replace_codes(data, name, codes), data)
    values = header_grid(data, name, columns).values(codes).reshape(-1)
    np.testing.assert_array_equal(values, llama_cpp_values(library, data, name, size))
    np.testing.assert_array_equal(values, gguf_values(data, name).reshape(-1))


@every_type
@given(seed=st.integers(0, 2**32 - 1))
@few
def test_other_codes_under_the_same_header(library: Library, name: str, seed: int) -> None:
    data = quantized(library, weights_of(seed), name, np.ones(COLUMNS, np.float32))
    grid = header_grid(data, name, COLUMNS)
    codes = np.random.default_rng(seed).integers(grid.low, grid.high + 1, (6, COLUMNS)).astype(np.uint8)
    other = replace_codes(data, name, codes)
    np.testing.assert_array_equal(read_codes(other, name, COLUMNS), codes)
    changed = header_grid(other, name, COLUMNS)
    np.testing.assert_array_equal(changed.step, grid.step)
    np.testing.assert_array_equal(changed.offset, grid.offset)
    np.testing.assert_array_equal(grid.values(codes).reshape(-1), gguf_values(other, name).reshape(-1))


@every_type
def test_nearest_codes_are_as_near_as_llama_cpps(library: Library, name: str) -> None:
    weights = weights_of(7)
    data = quantized(library, weights, name)
    grid = header_grid(data, name, COLUMNS)
    nearest = np.abs(grid.values(grid.codes(weights)) - weights)
    written = np.abs(grid.values(read_codes(data, name, COLUMNS)) - weights)
    assert (nearest <= written * (1 + 1e-5) + 1e-12).all()


@every_type
def test_a_block_of_zeros_stays_zero(library: Library, name: str) -> None:
    weights = np.zeros((2, COLUMNS), np.float32)
    data = quantized(library, weights, name, np.ones(COLUMNS, np.float32))
    grid = header_grid(data, name, COLUMNS)
    with np.errstate(all="raise"):
        codes = grid.codes(weights + np.float32(0.25))
    assert not grid.values(codes).any()
    assert not gguf_values(replace_codes(data, name, codes), name).any()


def test_types_with_codebooks_are_no_grids() -> None:
    assert not GRID_TYPES & {"IQ4_NL", "IQ4_XS", "F16", "BF16", "F32"}
    with pytest.raises(KeyError):
        header_grid(np.zeros(18, np.uint8), "IQ4_NL", 32)
