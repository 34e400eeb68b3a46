"""The machine that figures were taken on: printed beside them, hashed into cache keys, and asked by the plan."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from lora2edge.contracts import Machine
from lora2edge.processor import read_processor
from lora2edge.storage import digest

_FLAGS = (
    *(
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
    ),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
"""What decides which of a runtime's kernels run, on x86 and ARM."""
_ROOT = Path("/")


def describe() -> dict[str, Any]:
    """The machine as reports print it: processor, memory, system, GPUs, and how busy it is now."""
    model, flags = _processor(_ROOT)
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "physical_cores": _physical_cores(_ROOT),
        "logical_cores": len(os.sched_getaffinity(0)),
        "cpu_limit": _cpu_quota(_ROOT),
        "cpu_flags": flags,
        "ram_bytes": _meminfo(_ROOT, "MemTotal"),
        "ram_available_bytes": _available_ram(_ROOT),
        "memory_limit_bytes": _memory_limit(_ROOT)[0],
        "gpus": _gpus(),
        "system": _system(_ROOT),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load_average": list(os.getloadavg()),
    }


def fingerprint() -> str:
    """sha256 over what makes figures comparable: processor, flags, cores, limits, memory, GPUs."""
    facts = describe()
    facts["ram_bytes"] >>= 30  # a new kernel keeps a little more or less for itself
    kept = (
        "cpu",
        "architecture",
        "physical_cores",
        "logical_cores",
        "cpu_limit",
        "cpu_flags",
        "ram_bytes",
        "gpus",
    )
    return digest({key: facts[key] for key in kept})


def available(path: Path) -> Machine:
    """What work may use now: physical cores and memory within this process's limits, disk under `path`."""
    folder = Path(os.path.realpath(path))  # as resolve(), but for links that lead to themselves, which raise there
    while not os.access(folder, os.F_OK):
        folder = folder.parent
    quota = _cpu_quota(_ROOT)
    cores = _physical_cores(_ROOT)
    gpus = _gpus()
    return Machine(
        cores=max(1, min(cores, int(quota)) if quota else cores),
        ram_bytes=_available_ram(_ROOT),
        disk_bytes=shutil.disk_usage(folder).free,
        cuda=gpus[0]["name"] if gpus else None,
    )


def _processor(root: Path) -> tuple[str, list[str]]:
    """The processor's name and those of its flags that decide which kernels run."""
    model, flags = read_processor(root)
    return model, [flag for flag in _FLAGS if flag in flags]


def _physical_cores(root: Path) -> int:
    """Cores that this process may run on, hyper-threads of one core counted once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _lines(topology / "thread_siblings_list")
        cores.add(siblings[0] if siblings else str(cpu))
    return len(cores)


def _cpu_quota(root: Path) -> float | None:
    """The tightest processor limit of this process's control groups, in cores; None where there is none."""
    limits = []
    for folder in _control_groups(root, "cpu"):
        quota, period = [*" ".join(_lines(folder / "cpu.max")).split(), "", ""][:2]
        if not quota:  # control groups version 1
            quota = "".join(_lines(folder / "cpu.cfs_quota_us"))
            period = "".join(_lines(folder / "cpu.cfs_period_us"))
        if quota.isdigit() and period.isdigit() and int(period):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _memory_limit(root: Path) -> tuple[int | None, int]:
    """The tightest memory limit of this process's control groups (None: none), and what is left under it."""
    total = _meminfo(root, "MemTotal")
    tightest: int | None = None
    left = total
    for folder in _control_groups(root, "memory"):
        limit = "".join(_lines(folder / "memory.max")) or "".join(_lines(folder / "memory.limit_in_bytes"))
        if not limit.isdigit() or int(limit) >= total:  # "max", or version 1's huge number
            continue
        used = "".join(_lines(folder / "memory.current")) or "".join(_lines(folder / "memory.usage_in_bytes")) or "0"
        # The page cache counts as used, but gives way.
        stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
        cache = int(stat.get("inactive_file", stat.get("total_inactive_file", "0")))
        left = min(left, max(0, int(limit) - int(used) + cache))
        tightest = int(limit) if tightest is None else min(tightest, int(limit))
    return tightest, left


def _available_ram(root: Path) -> int:
    return min(_meminfo(root, "MemAvailable"), _memory_limit(root)[1])


def _control_groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control groups, from its own to the root, versions 1 and 2."""
    base = root / "sys/fs/cgroup"
    folders = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        mount = base if not controllers else base / controllers
        if controllers and controller not in controllers.split(","):
            continue
        if controllers and not mount.exists():
            mount = base / controller
        parts = [part for part in path.split("/") if part and part != ".."]
        folders += [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return folders


def _meminfo(root: Path, field: str) -> int:
    """A line of /proc/meminfo, in bytes; 0 where it is missing."""
    for line in _lines(root / "proc/meminfo"):
        key, _, value = line.partition(":")
        if key == field:
            return int(value.split()[0]) * 1024
    return 0


def _system(root: Path) -> str:
    for line in _lines(root / "etc/os-release"):
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return platform.platform()


def _gpus() -> list[dict[str, Any]]:
    """What `nvidia-smi` lists: name, memory in bytes, driver; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    gpus = []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        for line in listed.strip().splitlines():
            name, memory, driver = (part.strip() for part in line.split(","))
            mebibytes = int(memory) if memory.isdigit() else 0
            gpus.append({"name": name, "memory_bytes": mebibytes << 20, "driver": driver})
    return gpus


def _lines(path: Path) -> list[str]:
    """The lines of a small file of the kernel; none where it is missing or unreadable."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    return []
