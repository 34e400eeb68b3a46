"""Rounding, once for all backends: grids, and the methods that choose the codes on them."""

from lora2edge.quantize.grid import BITS, Grid, IntGrid, fit_mse, fit_range

__all__ = ["BITS", "Grid", "IntGrid", "fit_mse", "fit_range"]
