"""Rounding, once for all backends: grids, and the methods that choose the codes on them."""

from lora2edge.quantize.factor import Factor, GptqOptions, factorize
from lora2edge.quantize.gptq import corrected, gptq_codes, gptq_refit
from lora2edge.quantize.gram import Gram
from lora2edge.quantize.grid import BITS, Grid, IntGrid, fit_mse, fit_range, nearest_codes
from lora2edge.quantize.log import Rounded, RoundingLog

__all__ = [
    "BITS",
    "Factor",
    "GptqOptions",
    "Gram",
    "Grid",
    "IntGrid",
    "Rounded",
    "RoundingLog",
    "corrected",
    "factorize",
    "fit_mse",
    "fit_range",
    "gptq_codes",
    "gptq_refit",
    "nearest_codes",
]
