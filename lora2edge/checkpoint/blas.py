"""One thread per BLAS call, for work that already gives every core a slab of its own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator

import numpy as np

_NAMES = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
    ("scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)
_lock = threading.Lock()
_inside = 0
_before = 1


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within the block, numpy's matrix products run on the calling thread alone; may be nested and shared.

    OpenBLAS's own threads wait for each other in a loop. Beside a thread pool on a busy machine that turned a merge
    of 1.3 s into one of 20 s. Where numpy's BLAS is not known, nothing happens.
    """
    global _inside, _before
    calls = _thread_calls()
    if calls is None:
        yield
        return
    get, put = calls
    with _lock:
        if _inside == 0:
            _before = get()
            put(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                put(_before)


@functools.cache
def _thread_calls() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """numpy's extension module is linked with its BLAS, so that its handle finds the library's symbols."""
    core = getattr(np, "_core", None)
    path = getattr(getattr(core, "_multiarray_umath", None), "__file__", None)
    if path is None:
        return None
    library = ctypes.CDLL(path)
    for get_name, put_name in _NAMES:
        get, put = getattr(library, get_name, None), getattr(library, put_name, None)
        if get is not None and put is not None:
            get.restype, put.argtypes, put.restype = ctypes.c_int, [ctypes.c_int], None
            return get, put
    return None
