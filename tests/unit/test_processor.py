"""The processor's name and flags, from the kernel's list."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora2edge.processor import read_processor, vector_flags

X86 = "processor : 0\nmodel name : Some CPU @ 2 GHz\nflags : fpu sse4_1 smep avx2 avx512_vnni fma\n\nflags : other\n"
ARM = "processor : 0\nFeatures : fp asimd asimddp sme sme2 i8mm bf16 crc32\n"


@pytest.mark.parametrize(
    ("text", "name", "flags"),
    [
        (X86, "Some CPU @ 2 GHz", ["avx2", "avx512_vnni", "fma", "sse4_1"]),
        (ARM, None, ["asimd", "asimddp", "bf16", "i8mm", "sme", "sme2"]),
    ],
)
def test_name_and_vector_flags(tmp_path: Path, text: str, name: str | None, flags: list[str]) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(text)
    assert vector_flags(tmp_path) == flags
    if name:
        assert read_processor(tmp_path)[0] == name


def test_a_system_that_lists_none(tmp_path: Path) -> None:
    name, flags = read_processor(tmp_path)
    assert isinstance(name, str) and flags == frozenset()
