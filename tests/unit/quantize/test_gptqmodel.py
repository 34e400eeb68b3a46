"""The same layer and inputs through gptqmodel's GPTQ (7.6.0), where it is installed: its pins exclude ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora2edge.quantize import GptqOptions, Gram, factorize, fit_range, gptq_codes, gptq_refit
from tests.unit.quantize.reference import output_errors

pytest.importorskip("gptqmodel")


def theirs(weights: np.ndarray, x: np.ndarray, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """Dequantized weights and scales."""
    import torch
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    layer = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    layer.weight.data = torch.from_numpy(weights.copy())
    config = QuantizeConfig(**settings, act_group_aware=False, damp_percent=0.01, device="cpu", offload_to_disk=False)
    task = GPTQ(layer, config)
    task.quantizer.configure(perchannel=True)
    task.add_batch(torch.from_numpy(x), None)
    values, scales, *_ = task.quantize()
    return values.float().numpy(), scales.float().numpy()


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "static"),
    [(4, 128, True, True), (4, 32, False, True), (8, 128, True, True), (4, 128, True, False), (3, 128, False, False)],
)
def test_codes_are_gptqmodels(bits: int, group: int, symmetric: bool, static: bool) -> None:
    generator = np.random.default_rng(bits + group)
    weights = generator.standard_normal((128, 512)).astype(np.float32)
    mixing = np.eye(512) + generator.standard_normal((512, 512)) / np.sqrt(512)
    x = (generator.standard_normal((2000, 512)) @ mixing * np.exp(generator.standard_normal(512))).astype(np.float32)
    values, scales = theirs(
        weights, x, bits=bits, group_size=group, sym=symmetric, desc_act=static, static_groups=static
    )
    gram = Gram(512)
    gram.add(x)
    h = gram.mean()
    factor = factorize(h, gram.tokens, GptqOptions(activation_order=static))
    if static:
        fitted = fit_range(weights, bits, group, symmetric=symmetric)
        np.testing.assert_allclose(fitted.scales, scales, rtol=1e-6)
        grid = fitted.affine
        codes = gptq_codes(weights, grid, factor)
    else:
        codes, grid = gptq_refit(
            weights, group, lambda part, *_: fit_range(part, bits, symmetric=symmetric).affine, factor
        )
    mine = grid.values(codes)
    equal = np.abs(mine - values) < 0.01 * np.repeat(grid.step, group, axis=1)
    # A tie that float32 breaks the other way changes what follows in its row.
    assert equal.mean() > 0.98
    assert output_errors(weights, mine, h).sum() == pytest.approx(output_errors(weights, values, h).sum(), rel=5e-3)
