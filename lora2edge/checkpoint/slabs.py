"""Work cut into slabs: computed on all cores, taken in order. Memory is bounded by the slabs in flight."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from lora2edge.checkpoint.blas import one_blas_thread

S = TypeVar("S")
R = TypeVar("R")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(job: Callable[[S], R], work: Iterable[S]) -> Iterator[tuple[S, R]]:
    """(slab, job(slab)) in the order of `work`, computed on all cores, with at most two slabs a core in flight."""
    workers = cores()
    waiting: deque[tuple[S, Future[R]]] = deque()
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        try:
            for slab in work:
                waiting.append((slab, pool.submit(job, slab)))
                if len(waiting) > 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
