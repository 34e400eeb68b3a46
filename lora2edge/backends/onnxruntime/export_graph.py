"""What is done to a graph that another tool wrote: shapes made plain, products counted, weights quantized."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora2edge.errors import UnsupportedError

_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")
_BLOCKS = ("MatMulNBits", "QMoE")
_INTEGER = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
_MOST_BYTES = 1 << 30
"""Of a float32 graph; from here on its weights are kept outside the model file, which holds 2 GB at most."""


def load_graph(path: Path) -> Any:
    """The model without its external weights."""
    import onnx

    return onnx.load(path, load_external_data=False)


def count_products(model: Any) -> dict[str, int]:
    """How its constant matrices are stored: "float32", "int4 in blocks of 128", "int8 by rows" → products with them."""
    constants = _constants(model)
    found = Counter[str]()
    for node in model.graph.node:
        if node.op_type in _PRODUCTS and node.input[1] in constants:
            found["float32"] += 1
        elif node.op_type in _INTEGER:
            found["int8 by rows"] += 1
        elif node.op_type in _BLOCKS:
            told = {item.name: item.i for item in node.attribute}
            bits = told.get("bits", told.get("expert_weight_bits", 4))
            found[f"int{bits} in blocks of {told.get('block_size', 0)}"] += 1
    return dict(sorted(found.items()))


def name_cache_sizes(path: Path, config: Mapping[str, Any]) -> None:
    """Writes the size of a head, as genai_config.json has it, where the graph only has a name for it.

    A cache is made from the graph's own shapes, in the packed copy of `finalize` too, which has no other file.
    """
    model = load_graph(path)
    decoder = config.get("model", {}).get("decoder", {})
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            dimensions = value.type.tensor_type.shape.dim
            for axis, size in ((1, decoder.get("num_key_value_heads")), (3, decoder.get("head_size"))):
                if len(dimensions) == 4 and not dimensions[axis].HasField("dim_value") and isinstance(size, int):
                    dimensions[axis].dim_value = size
    path.write_bytes(model.SerializeToString(deterministic=True))


def quantize_dynamic(source: Path, path: Path) -> None:
    """The float32 graph `source` with its layers' matrices in int8, a scale a row, and uint8 activations.

    What is computed once for a text (a `Gemm`: pooler and classifier) stays float, as in graphs of our own. Raises
    UnsupportedError `export-precision` where a layer's matrix did not become an integer product.
    """
    import onnx
    from onnxruntime import quantization

    model = onnx.load(source)
    _resolve_identities(model)
    kept = [node.name for node in model.graph.node if node.op_type == "Gemm"]
    wanted = count_products(model).get("float32", 0) - len(kept)
    del model.graph.value_info[:]  # shapes that a newer exporter wrote trip the quantizer's own
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it recommends its own preparation step
    try:
        quantization.quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=[f"{name}_MatMul" for name in kept],  # what it makes of a Gemm first
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=model.ByteSize() > _MOST_BYTES,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        logging.getLogger().setLevel(level)
    found = count_products(load_graph(path))
    made = found.get("int8 by rows", 0)
    if not wanted or made != wanted or found.get("float32", 0) != len(kept):
        raise UnsupportedError(
            "export-precision",
            f"{made} of {wanted} layers' products became integer products",
            why="the rest would run in float32 under the name of int8",
            hint="precision: fp32",
        )


def _constants(model: Any) -> set[str]:
    """Names of weights, under other names too."""
    names = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:  # in the order of use
        if node.op_type == "Identity" and node.input[0] in names:
            names.update(node.output)
    return names


def _resolve_identities(model: Any) -> None:
    """Weights that layers share are read by their own name: the quantizer takes no others for weights."""
    names = {tensor.name: tensor.name for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in names:
            names[node.output[0]] = names[node.input[0]]
            continue
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
