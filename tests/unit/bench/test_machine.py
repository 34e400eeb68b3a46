from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lora2edge.bench import machine


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_this_machine() -> None:
    facts = machine.describe()
    cpuinfo = Path("/proc/cpuinfo").read_text()
    assert all(flag in cpuinfo for flag in facts["cpu_flags"])
    assert 1 <= facts["physical_cores"] <= facts["logical_cores"] == len(os.sched_getaffinity(0))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert facts["ram_bytes"] == pytest.approx(pages, rel=0.02)
    now = machine.available(Path("/"))
    assert 0 < now.ram_bytes <= facts["ram_bytes"] and 1 <= now.cores <= facts["physical_cores"]
    assert (now.cuda is None) == (not facts["gpus"])


def test_the_fingerprint_is_stable_and_free_of_the_load() -> None:
    assert machine.fingerprint() == machine.fingerprint()


def test_disk_of_a_folder_that_is_not_made_yet(tmp_path: Path) -> None:
    assert machine.available(tmp_path / "a/b").disk_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_hyper_threads_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for cpu in range(4):
        write(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 2},{cpu % 2 + 2}")
    assert machine._physical_cores(tmp_path) == 2


def test_limits_of_control_groups_version_2(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/pod/box\n")
    write(tmp_path, "proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 15000000 kB\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    write(tmp_path, "sys/fs/cgroup/pod/cpu.max", "350000 100000\n")
    write(tmp_path, "sys/fs/cgroup/pod/box/cpu.max", "800000 100000\n")
    write(tmp_path, "sys/fs/cgroup/pod/box/memory.max", f"{4 << 30}\n")
    write(tmp_path, "sys/fs/cgroup/pod/box/memory.current", f"{3 << 30}\n")
    write(tmp_path, "sys/fs/cgroup/pod/box/memory.stat", f"anon 1\ninactive_file {1 << 30}\n")
    assert machine._cpu_quota(tmp_path) == 3.5
    assert machine._memory_limit(tmp_path) == (4 << 30, 2 << 30)
    assert machine._available_ram(tmp_path) == 2 << 30


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n")
    write(tmp_path, "proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 15000000 kB\n")
    write(tmp_path, "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us", "150000\n")
    write(tmp_path, "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path, "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes", f"{2 << 30}\n")
    write(tmp_path, "sys/fs/cgroup/memory/docker/x/memory.usage_in_bytes", f"{1 << 30}\n")
    assert machine._cpu_quota(tmp_path) == 1.5
    assert machine._memory_limit(tmp_path) == (2 << 30, 1 << 30)


def test_no_limits(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 900 kB\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert machine._cpu_quota(tmp_path) is None
    assert machine._memory_limit(tmp_path)[0] is None and machine._available_ram(tmp_path) == 900 * 1024
