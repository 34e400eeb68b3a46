"""Written checkpoints: what safetensors and transformers read back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.hf import write
from lora2edge.backends.hf.write import write_checkpoint
from lora2edge.checkpoint import all_finite, encode_finite, open_checkpoint
from lora2edge.contracts import Checkpoint
from lora2edge.errors import CheckpointError
from lora2edge.progress import SILENT
from lora2edge.recipe import Recipe
from lora2edge.survey import survey_build
from lora2edge.target import load_target
from tests.tiny import make_adapter, make_checkpoint, shake_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("write")
    base = make_checkpoint(root / "base", "qwen2", shards=3)
    return base, make_adapter(root / "adapter", base, targets=["q_proj", "down_proj", "embed_tokens"])


def view_of(made: tuple[Path, Path]) -> Checkpoint:
    return merge(open_checkpoint(made[0]), [read_adapter(made[1])])


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


class Recorder:
    """Counts what the writer says it has done."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.finished = False

    def start(self, what: str, total: int, unit: str = "") -> None:
        self.total = total

    def advance(self, amount: int = 1) -> None:
        self.done += amount

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_files_are_whole_and_equal_from_run_to_run(
    made: tuple[Path, Path], tmp_path: Path, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SLAB_ELEMENTS", 1000)
    monkeypatch.setattr(write, "COPY_BYTES", 5000)
    progress = Recorder()
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        write_checkpoint(view_of(made), tmp_path / run, progress, shard_bytes)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    files = sorted((tmp_path / "one").glob("*.safetensors"))
    assert (len(files) > 1) is (shard_bytes < 10**6)
    view = view_of(made)
    seen = {}
    for file in files:
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                seen[name] = file.name
                expected = torch.from_numpy(view.rows(name, 0, view.tensors[name].shape[0])).to(torch.bfloat16)
                assert tensor.dtype == torch.bfloat16
                # Other slabs, another order of the sums in BLAS: near-ties may fall either way.
                assert (tensor != expected).sum() <= max(1, tensor.numel() // 10_000), name
    assert set(seen) == set(view.tensors)
    assert "lm_head.weight" in seen
    if len(files) > 1:
        index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == seen
        assert index["metadata"]["total_size"] == sum(2 * info.size for info in view.tensors.values())
    assert progress.finished
    assert progress.done == 2 * progress.total > 0


def test_transformers_loads_it_whole(made: tuple[Path, Path], tmp_path: Path) -> None:
    write_checkpoint(view_of(made), tmp_path, SILENT, 60_000)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer, original = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(made[0])
    messages = [{"role": "user", "content": "头痛 headache 3333"}]
    assert tokenizer.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert (tmp_path / "generation_config.json").read_bytes() == (made[0] / "generation_config.json").read_bytes()


def test_a_plain_checkpoint_is_copied_byte_by_byte(made: tuple[Path, Path], tmp_path: Path) -> None:
    write_checkpoint(merge(open_checkpoint(made[0]), []), tmp_path, SILENT)
    written = load_file(tmp_path / "model.safetensors")
    for shard in made[0].glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert torch.equal(written[name], tensor)


def test_mixed_dtypes_keep_their_alignment(tmp_path: Path) -> None:
    """The first file ends with an odd number of bytes, the second holds float32: one file is made of both."""
    base = make_checkpoint(tmp_path / "base", "qwen2")
    first = {**load_file(base / "model.safetensors"), "model.flags": torch.ones(5, dtype=torch.bool)}
    second = {"model.norm.weight": first.pop("model.norm.weight").float(), "model.scalar": torch.tensor(2.5)}
    (base / "model.safetensors").unlink()
    weight_map = {}
    for name, weights in (("model-1.safetensors", first), ("model-2.safetensors", second)):
        save_file(weights, base / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(weights, name))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "out").mkdir()
    write_checkpoint(merge(open_checkpoint(base), []), tmp_path / "out", SILENT)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in {**first, **second}.items())
    for name in second:
        place = open_checkpoint(tmp_path / "out").stored(name)
        assert place is not None
        assert place.offset % 4 == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_in_an_unchanged_tensor_is_not_copied(tmp_path: Path, dtype: str, value: float) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen2", dtype=dtype)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base, targets=["up_proj"])
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight") as error:
        write_checkpoint(merge(open_checkpoint(base), [read_adapter(adapter)]), tmp_path / "out", SILENT)
    assert error.value.code == "base-nan"


def spoiled(folder: Path, dtype: str, spoil: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A base some of whose weights are not finite, or zero."""
    base = make_checkpoint(folder, "llama", dtype=dtype, tied=False)
    tensors = load_file(base / "model.safetensors")
    spoil(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


def trained(folder: Path, base: Path, config: peft.PeftConfig) -> Path:
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    shake_adapter(model)
    model.save_pretrained(folder)
    return folder


DORA_HEAD = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"], use_dora=True)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("config", "name", "row", "value"),
    [
        (peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]), Q_PROJ, 3, "nan"),
        (peft.LoHaConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"]), Q_PROJ, 3, "-inf"),
        (
            peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["k_proj"], trainable_token_indices=[3]),
            "model.embed_tokens.weight", 9, "inf",
        ),
        (DORA_HEAD, "lm_head.weight", slice(760, None), "0"),
    ],
)  # fmt: skip
def test_nan_in_a_changed_tensor_is_not_written(
    tmp_path: Path, config: peft.PeftConfig, name: str, row: int | slice, value: str, dtype: str
) -> None:
    base = spoiled(tmp_path / "base", dtype, lambda tensors: tensors[name][row].fill_(float(value)))
    adapter = trained(tmp_path / "adapter", base, config)
    if config is DORA_HEAD:  # B stays zero where the vocabulary is padded: 0/0
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        next(tensor for key, tensor in tensors.items() if "lora_B" in key)[760:] = 0
        next(tensor for key, tensor in tensors.items() if "magnitude" in key)[760:] = 0
        save_file(tensors, path, {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError) as error:
        write_checkpoint(merge(open_checkpoint(base), [read_adapter(adapter)]), tmp_path / "out", SILENT)
    assert error.value.code == "weight-not-finite" and name in error.value.what


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_what_is_finite_when_rounded(dtype: str) -> None:
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[dtype]
    bits = [0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    bits += [0x477FE000, 0x477FEFFF, 0x477FF000, 0, 1, 0x3F800000]  # 65504 and where float16 begins to overflow
    for word in (*bits, *(word | 1 << 31 for word in bits)):
        rows = np.array([[1.0, 0.0], [-2.0, 0.0]], np.float32)
        rows.view(np.uint32)[1, 1] = word
        rounded, finite = encode_finite(rows, dtype)
        theirs = torch.from_numpy(rows).to(kind)
        assert finite == bool(theirs.isfinite().all()), hex(word)
        assert all_finite(rounded.reshape(-1).view(np.uint8), dtype) == finite


def test_full_disk_reaches_the_caller(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="no space") as error:
        write_checkpoint(view_of(made), tmp_path, SILENT)
    assert error.value.errno == errno.ENOSPC


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen2", dtype="float16")
    adapter = make_adapter(tmp_path / "adapter", base, targets=["up_proj"], alpha=1e6, strength=3.0)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="up_proj") as error:
        write_checkpoint(merge(open_checkpoint(base), [read_adapter(adapter)]), tmp_path / "out", SILENT)
    assert error.value.code == "float16-overflow"


def test_rows_from_several_threads(made: tuple[Path, Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    view = view_of(made)
    names = [name for name, info in view.tensors.items() if len(info.shape) == 2] * 4
    alone = [view.rows(name, 1, 32) for name in names]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda name: view.rows(name, 1, 32), names))
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(alone, together, strict=True))


MEASURED = """
import atexit, sys
from lora2edge.bench.worker import read_memory
from lora2edge.cli import main
atexit.register(lambda: print(read_memory()["peak_rss_bytes"], file=sys.stderr))
main()
"""


@pytest.mark.parametrize("large", [False, True])
def test_the_memory_that_the_plan_states_is_enough_and_not_far_above(tmp_path: Path, large: bool) -> None:
    """Of a whole `lora2edge merge`, for a base of 100 kB and one of 130 MB with a large adapter."""
    shape = {"hidden": 1024, "intermediate": 8192, "layers": 2} if large else {}
    base = make_checkpoint(tmp_path / "base", "qwen2", **shape)
    adapter = make_adapter(tmp_path / "adapter", base, targets=["q_proj", "down_proj"], r=512 if large else 8)
    survey = survey_build(Recipe(base=str(base), adapter=str(adapter)), [load_target("hf/merged")])
    stated = survey.estimates["hf/merged"].ram_bytes
    command = ["merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--json"]
    done = subprocess.run([sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, check=True)
    peak = int(done.stderr.split()[-1])
    assert peak < stated < 1.8 * peak
