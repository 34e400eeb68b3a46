"""Tensors with GPTQ's codes: what llama.cpp reads from the bytes, and how they compare with its own."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from lora2edge.backends.gguf import rounding
from lora2edge.backends.gguf.blocks import header_grid, read_codes
from lora2edge.backends.gguf.llama_cpp import load_library
from lora2edge.backends.gguf.mix import row_bytes
from lora2edge.backends.gguf.model import Planned
from lora2edge.backends.gguf.rounding import encode_gptq
from lora2edge.backends.gguf.write import encode
from lora2edge.errors import CheckpointError
from lora2edge.quantize import Factor, Gram, RoundingLog, factorize

ROWS, COLUMNS = 70, 512
TENSOR = Planned("blk.0.ffn_down.weight", (ROWS, COLUMNS), source="down")
GENERATOR = np.random.default_rng(0)
WEIGHTS = GENERATOR.standard_normal((ROWS, COLUMNS)).astype(np.float32)
MIXING = np.eye(COLUMNS) + GENERATOR.standard_normal((COLUMNS, COLUMNS)) / np.sqrt(COLUMNS)
INPUTS = (GENERATOR.standard_normal((2000, COLUMNS)) @ MIXING).astype(np.float32)


def factor_of(inputs: np.ndarray) -> Factor:
    gram = Gram(COLUMNS)
    gram.add(inputs)
    return factorize(gram.mean(), gram.tokens)


def output_error(data: np.ndarray, name: str) -> float:
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).reshape(WEIGHTS.shape)
    return float(np.square(INPUTS @ (values - WEIGHTS).T).sum())


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q4_1", "Q5_1", "Q2_K"])
def test_at_the_same_size_the_outputs_are_nearer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "SLAB_ELEMENTS", 16 * COLUMNS)
    factor, log = factor_of(INPUTS), RoundingLog()
    mine = encode_gptq(TENSOR, WEIGHTS, name, load_library(), factor, log)
    imatrix = np.square(INPUTS, dtype=np.float64).mean(axis=0).astype(np.float32)
    theirs = encode(TENSOR, WEIGHTS, name, load_library(), imatrix)
    assert len(mine) == len(theirs) == ROWS * row_bytes(name, COLUMNS)
    assert output_error(mine, name) < 0.8 * output_error(theirs, name)
    headers = encode(TENSOR, WEIGHTS, name, load_library(), factor.importance)
    for part in ("step", "offset"):
        ours, written = (getattr(header_grid(data, name, COLUMNS), part) for data in (mine, headers))
        np.testing.assert_array_equal(ours, written)
    assert (read_codes(mine, name, COLUMNS) != read_codes(headers, name, COLUMNS)).mean() > 0.05
    assert log.to_json() == {"tensors": 1, "by_method": {"gptq": 1}, "unusual": []}


def test_without_sound_inputs_it_is_llama_cpps_rounding() -> None:
    log = RoundingLog()
    data = encode_gptq(TENSOR, WEIGHTS, "Q4_K", load_library(), factor_of(INPUTS[:0]), log)
    np.testing.assert_array_equal(data, encode(TENSOR, WEIGHTS, "Q4_K", load_library(), None))
    assert log.entries[0].fallback == "no tokens"


def test_a_type_without_a_grid_is_llama_cpps() -> None:
    log, factor = RoundingLog(), factor_of(INPUTS)
    for name in ("F16", "IQ4_XS"):
        data = encode_gptq(TENSOR, WEIGHTS, name, load_library(), factor, log)
        np.testing.assert_array_equal(data, encode(TENSOR, WEIGHTS, name, load_library(), factor.importance))
    assert log.to_json()["tensors"] == 0


def test_a_block_of_zeros_stays_zero_and_is_counted() -> None:
    weights, log = WEIGHTS.copy(), RoundingLog()
    weights[:, 256:], weights[4] = 0, 0
    data = encode_gptq(TENSOR, weights, "Q6_K", load_library(), factor_of(INPUTS), log)
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q6_K).reshape(weights.shape)
    assert not values[:, 256:].any()
    assert not values[4].any()
    assert log.entries[0].zero_groups == ROWS * 16 + 16


@pytest.mark.parametrize(("value", "code"), [(np.nan, "weight-not-finite"), (1e6, "weight-range")])
def test_weights_that_no_block_holds(value: float, code: str) -> None:
    weights = WEIGHTS.copy()
    weights[3, 3] = value
    with pytest.raises(CheckpointError) as caught:
        encode_gptq(TENSOR, weights, "Q4_K", load_library(), factor_of(INPUTS), RoundingLog())
    assert caught.value.code == code
