"""The types of a mixture. `test_peer.py` compares all of them with llama-quantize; these need nothing built."""

from __future__ import annotations

from collections import Counter

import pytest

from lora2edge.backends.gguf.mix import FILE_TYPES, Shape, choose_types, order_key

MODEL = Shape(layers=16, heads=8, kv_heads=2, is_llama=True)


def shapes(layers: int = 16, width: int = 256, *, tied: bool = True) -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {"token_embd.weight": (512, width), "output_norm.weight": (width,)}
    if not tied:
        result["output.weight"] = (512, width)
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            result[f"blk.{layer}.{name}.weight"] = (width, width)
        result[f"blk.{layer}.attn_norm.weight"] = (width,)
        result[f"blk.{layer}.attn_q.bias"] = (width,)
    return result


def types(file_type: str, *, imatrix: bool = False, model: Shape = MODEL, **kwargs: int | bool) -> dict[str, str]:
    return choose_types(shapes(model.layers, **kwargs), FILE_TYPES[file_type], model, imatrix=imatrix)  # type: ignore[arg-type]


def test_vectors_stay_float() -> None:
    for file_type in FILE_TYPES:
        found = types(file_type)
        assert {found[name] for name, shape in shapes().items() if len(shape) == 1} == {"F32"}


def test_a_tied_embedding_is_stored_as_the_head_that_it_is() -> None:
    assert types("Q4_K_M")["token_embd.weight"] == "Q6_K"
    untied = types("Q4_K_M", tied=False)
    assert (untied["token_embd.weight"], untied["output.weight"]) == ("Q4_K", "Q6_K")


def test_more_bits_go_to_the_first_and_last_eighth_and_every_third_between() -> None:
    found = types("Q4_K_M")
    better = [layer for layer in range(16) if found[f"blk.{layer}.ffn_down.weight"] == "Q6_K"]
    assert better == [0, 1, 4, 7, 10, 13, 14, 15]
    assert [layer for layer in range(16) if found[f"blk.{layer}.attn_v.weight"] == "Q6_K"] == better


def test_layers_count_by_number_not_by_text() -> None:
    names = [f"blk.{layer}.ffn_down.weight" for layer in (10, 9, 2)]
    assert sorted(names, key=order_key) == list(reversed(names))
    assert order_key("output_norm.weight") < order_key("blk.0.attn_k.weight")


def test_the_importance_matrix_moves_the_first_down_projections() -> None:
    early = [f"blk.{layer}.ffn_down.weight" for layer in range(2)]
    assert {types("Q4_0", imatrix=True)[name] for name in early} == {"Q4_1"}
    assert {types("Q4_0")[name] for name in early} == {"Q4_0"}
    assert {types("IQ4_XS")[name] for name in early} == {"Q5_K"}
    assert {types("IQ4_XS", imatrix=True)[name] for name in early} == {"IQ4_XS"}


@pytest.mark.parametrize(("kv_heads", "expected"), [(2, "Q4_K"), (4, "Q3_K")])
def test_few_value_heads_get_more_bits(kv_heads: int, expected: str) -> None:
    found = types("Q2_K", model=Shape(16, 8, kv_heads, is_llama=True))
    assert found["blk.3.attn_v.weight"] == expected


def test_the_70b_rule() -> None:
    found = types("Q4_K_M", model=Shape(80, 64, 8, is_llama=True))
    assert set(Counter(found[f"blk.{layer}.attn_v.weight"] for layer in range(80))) == {"Q6_K", "Q5_K"}
    found = types("Q4_K_M", model=Shape(80, 64, 8, is_llama=False))
    assert {found[f"blk.{layer}.attn_v.weight"] for layer in range(80)} == {"Q6_K", "Q4_K"}


@pytest.mark.parametrize(
    ("width", "expected"), [(96, {"F32", "Q5_0", "Q8_0"}), (80, {"F32", "F16"}), (256, {"F32", "Q4_K", "Q6_K"})]
)
def test_widths_that_blocks_do_not_divide(width: int, expected: set[str]) -> None:
    assert set(types("Q4_K_M", width=width).values()) == expected
