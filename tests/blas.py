"""How many threads numpy's matrix products take, for tests that set it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lora2edge.checkpoint.blas import _thread_calls


def thread_calls() -> tuple[Callable[[], int], Callable[[int], None]]:
    """What reads and what sets it. Skips where numpy brings another BLAS than its wheels do, and nowhere else."""
    calls = _thread_calls()
    if calls is None:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
        assert "openblas" not in blas, "what numpy's wheels bring has to be found"
        pytest.skip(f"numpy was built with {blas} here")
    return calls
