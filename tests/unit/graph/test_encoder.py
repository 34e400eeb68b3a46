"""Descriptions of encoders: what they say of a checkpoint, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import TensorInfo
from lora2edge.errors import CheckpointError, InputError, UnsupportedError
from lora2edge.graph.encoder import Encoder, Relative, Rows
from lora2edge.graph.encoder_families import describe_encoder
from tests.unit.graph.encoders import FAMILIES, PAD, TASKS, make_encoder

Given = tuple[dict[str, Any], dict[str, TensorInfo], Any]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Given]:
    made: dict[tuple[str, str], Given] = {}

    def find(family: str, task: str = "sequence") -> Given:
        if (family, task) not in made:
            folder = tmp_path_factory.mktemp("encoder")
            make_encoder(folder, family, task)
            checkpoint = open_checkpoint(folder)
            made[family, task] = dict(checkpoint.config), dict(checkpoint.tensors), checkpoint.task
            checkpoint.close()
        config, tensors, name = made[family, task]
        return dict(config), dict(tensors), name

    return find


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_told_once(given: Callable[..., Given], family: str, task: str) -> None:
    config, tensors, name = given(family, task)
    encoder = describe_encoder(config, tensors, name)
    told = {matrix.name: (matrix.rows, matrix.columns) for matrix in encoder.matrices}
    tables = {
        table.name
        for table in (
            encoder.embeddings.words,
            encoder.embeddings.positions,
            encoder.embeddings.types,
            encoder.relative.embeddings if encoder.relative else None,
        )
        if table
    }
    stored = {tensor.name: tensor.shape for tensor in tensors.values() if len(tensor.shape) == 2}
    expected = {key: shape for key, shape in stored.items() if key not in tables}
    assert {key: shape for key, shape in expected.items() if ".pooler." not in key or key in told} == told
    assert len(told) == len(encoder.matrices)
    assert {matrix.layer for matrix in encoder.matrices} == {None, *range(config.get("num_hidden_layers", 2))}
    assert encoder.labels == 3 and encoder.task == name


def test_longest_text_and_token_types(given: Callable[..., Given]) -> None:
    def told(family: str) -> tuple[int, bool, str]:
        encoder: Encoder = describe_encoder(*given(family))
        return encoder.max_length, encoder.has_token_types, encoder.family

    assert told("bert") == (48, True, "bert")
    assert told("roberta") == (48 - PAD - 1, False, "roberta")
    assert told("xlm-roberta") == (48 - PAD - 1, False, "xlm-roberta")
    assert told("roberta, two types") == (48 - PAD - 1, True, "roberta")
    assert told("distilbert") == (48, False, "distilbert")
    assert told("deberta-v3") == (48, False, "deberta-v2")
    assert told("deberta-v2") == (48, True, "deberta-v2")


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("bert", {"hidden_act": "mish"}, "hidden_act is mish"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is relative_key"),
        ("bert", {"position_embedding_type": "relative_key_query"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"num_attention_heads": 5}, "hidden_size 32 is not a multiple of 5 heads"),
        ("bert", {"model_type": "modernbert"}, "model_type is modernbert"),
        ("bert", {"model_type": None}, "model_type is None"),
        ("distilbert", {"activation": "softmax"}, "activation is softmax"),
        ("deberta, convolution", {"conv_kernel_size": 4}, "conv_kernel_size is 4"),
        ("deberta, convolution", {"conv_groups": 3}, "conv_groups 3"),
        ("deberta, convolution", {"conv_act": "mish"}, "conv_act is mish"),
        ("deberta-v3", {"pos_att_type": ["c2p", "p2p"]}, "pos_att_type"),
        ("deberta-v3", {"pos_att_type": 3}, "pos_att_type"),
        ("deberta-v3", {"attention_head_size": 4}, "attention_head_size"),
        ("deberta-v3", {"pooler_hidden_act": "laplace"}, "pooler_hidden_act is laplace"),
        ("deberta-v3", {"num_attention_heads": 64}, "not a multiple of 64 heads"),
    ],
)
def test_what_is_not_known_is_refused(
    given: Callable[..., Given], family: str, change: dict[str, Any], words: str
) -> None:
    config, tensors, task = given(family)
    with pytest.raises(InputError) as caught:
        describe_encoder({**config, **change}, tensors, task)
    errors = getattr(caught.value, "errors", (caught.value,))
    found = [error for error in errors if error.code == "onnx-architecture"]
    assert isinstance(found[0], UnsupportedError)
    assert words in found[0].what
    assert found[0].why and found[0].hint


def test_other_tasks_are_refused(given: Callable[..., Given]) -> None:
    config, tensors, _ = given("bert")
    with pytest.raises(UnsupportedError, match="masked-lm"):
        describe_encoder(config, tensors, "masked-lm")


def test_layers_of_unknown_kind_are_refused(given: Callable[..., Given]) -> None:
    config, tensors, task = given("bert")
    extra = "bert.encoder.layer.0.attention.self.distance_embedding.weight"
    with pytest.raises(UnsupportedError, match=r"distance_embedding"):
        describe_encoder(config, {**tensors, extra: TensorInfo(extra, (95, 8), "F32", "model.safetensors")}, task)


def test_tensors_that_no_classifier_needs_are_let_be(given: Callable[..., Given]) -> None:
    config, tensors, task = given("bert", "token")
    expected = describe_encoder(config, tensors, task)
    more = {
        "bert.embeddings.position_ids": (1, 48), "bert.pooler.dense.weight": (32, 32), "bert.pooler.dense.bias": (32,),
        "cls.predictions.bias": (384,), "cls.seq_relationship.weight": (2, 32),
    }  # fmt: skip
    infos = {name: TensorInfo(name, shape, "F32", "model.safetensors") for name, shape in more.items()}
    assert describe_encoder(config, {**tensors, **infos}, task) == expected


def test_norms_with_gamma_and_beta(given: Callable[..., Given]) -> None:
    """As the first checkpoints of BERT have them; transformers renames them when it loads."""
    config, tensors, task = given("bert")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): info
        for name, info in tensors.items()
    }
    encoder = describe_encoder(config, renamed, task)
    assert encoder.embeddings.norm.weight == "bert.embeddings.LayerNorm.gamma"
    assert encoder.layers[1].norm.bias == "bert.encoder.layer.1.output.LayerNorm.beta"


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.1.output.dense.bias", "classifier.weight", "bert.pooler.dense.bias"]
)
def test_a_missing_tensor_is_refused(given: Callable[..., Given], name: str) -> None:
    config, tensors, task = given("bert")
    del tensors[name]
    with pytest.raises(InputError) as caught:
        describe_encoder(config, tensors, task)
    errors = getattr(caught.value, "errors", (caught.value,))
    assert any(error.code == "missing-tensors" and name in error.what for error in errors)


@pytest.mark.parametrize(("family", "key"), [("bert", "num_hidden_layers"), ("distilbert", "n_layers")])
def test_a_count_that_nothing_has_takes_no_time(given: Callable[..., Given], family: str, key: str) -> None:
    config, tensors, task = given(family)
    with pytest.raises(CheckpointError) as caught:
        describe_encoder({**config, key: 2**31 - 1}, tensors, task)
    assert caught.value.code == "missing-tensors"


def test_no_table_bounds_the_length(given: Callable[..., Given]) -> None:
    config, tensors, task = given("deberta-v3")
    assert describe_encoder({**config, "max_position_embeddings": 2**31 - 1}, tensors, task).max_length == 65536


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"intermediate_size": 64}, "tensor-shape", ("[48, 32]", "[64, 32]")),
        ({"max_position_embeddings": 40}, "tensor-shape", ("[48, 32]", "[40, 32]")),
        ({"id2label": {"0": "A", "1": "B"}}, "label-count", ("3 rows", "2 labels")),
        ({"layer_norm_eps": -1}, "bad-config", ("layer_norm_eps", "-1")),
        ({"type_vocab_size": "two"}, "bad-config", ("type_vocab_size", "two")),
    ],
)
def test_config_and_weights_must_agree(
    given: Callable[..., Given], change: dict[str, Any], code: str, words: tuple[str, ...]
) -> None:
    config, tensors, task = given("bert")
    with pytest.raises(InputError) as caught:
        describe_encoder({**config, **change}, tensors, task)
    errors = getattr(caught.value, "errors", (caught.value,))
    found = [error for error in errors if error.code == code]
    assert found and all(isinstance(error, CheckpointError) for error in found)
    assert all(word in found[0].what for word in words)


@pytest.mark.parametrize(
    ("buckets", "farthest", "most"), [(256, 512, 512), (256, 512, 1024), (8, 48, 48), (32, 128, 96)]
)
def test_distances_share_buckets_as_in_transformers(buckets: int, farthest: int, most: int) -> None:
    import torch
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    relative = Relative(Rows("r", 2 * buckets, 8), None, buckets, farthest, True, True)
    distances = torch.arange(most, -most - 1, -1)
    expected = make_log_bucket_position(distances, buckets, farthest).to(torch.long) + buckets
    np.testing.assert_array_equal(relative.row(most), expected.clamp(0, 2 * buckets - 1).numpy())


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, lora2edge.graph.encoder_families, lora2edge.graph.ort_encoder, lora2edge.graph.ranges;"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'transformers') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
