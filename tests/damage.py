"""Damaged and hostile checkpoints and adapters: what each case breaks, and what the one error must say.

    for case in CASES:
        case.damage(folders)     # `folders.base` and `folders.adapter` are copies of a sound pair
        …                        # lora2edge must refuse, or where `case.may_pass`, do its work

Everything is a pure function of the sound pair: no clock, no global random state.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
ADAPTER_CONFIG, WEIGHTS, ADAPTER_WEIGHTS = "adapter_config.json", "model.safetensors", "adapter_model.safetensors"
HUGE = 10**12
DEEP = 200_000
MERGE, LOWER = ("merge",), ("lower",)
BOTH = (*MERGE, *LOWER)


@dataclass(frozen=True)
class Folders:
    """Copies that a case may break."""

    base: Path
    adapter: Path

    def file(self, name: str) -> Path:
        """The file of that name, in the folder that it belongs to."""
        return (self.adapter if name.startswith("adapter_") else self.base) / name


@dataclass(frozen=True)
class Case:
    """One damage."""

    name: str
    damage: Callable[[Folders], object]
    says: str = ""
    """A word that the error must hold: the damaged file's, key's or tensor's name."""
    code: str = ""
    """The error's code, where only one is right."""
    sharded: bool = False
    """Whether the base is the one with several weight files and an index."""
    may_pass: bool = False
    """The damage may hit what nobody reads: then the result must be that of the sound pair."""
    verbs: tuple[str, ...] = BOTH


# ---------------------------------------------------------------- safetensors


def split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header's JSON and the data of a sound safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_header(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """Writes a safetensors file from a header (JSON, or bytes as they stand) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _one(name: str) -> tuple[str, ...]:
    """One verb for what both read with the same code: one for the base's files, the other for the adapter's."""
    return MERGE if name == WEIGHTS else LOWER


def _truncated() -> Iterator[Case]:
    places = (0, 1, 7, 8, 9, "h/4", "h/2", "h-1", "h", "h+1", "d/4", "d/2", "d-2", "d-1")
    for name, place in itertools.product((WEIGHTS, ADAPTER_WEIGHTS), places):

        def cut(folders: Folders, name: str = name, place: int | str = place) -> None:
            path = folders.file(name)
            raw = path.read_bytes()
            header = int.from_bytes(raw[:8], "little")
            sizes = {"h": 8 + header, "d": len(raw)}
            if isinstance(place, str):
                whole, sign, number = sizes[place[0]], place[1:2], int(place[2:] or 0)
                at = {"": whole, "/": whole // (number or 1), "-": whole - number, "+": whole + number}[sign]
            else:
                at = place
            path.write_bytes(raw[:at])

        yield Case(f"truncated-{name}-{place}", cut, name, "bad-safetensors", verbs=_one(name))


def _flipped() -> Iterator[Case]:
    """One bit, or sixteen bytes of noise, in the length or the header."""
    for name, seed in [*((WEIGHTS, n) for n in range(40)), *((ADAPTER_WEIGHTS, n) for n in range(30))]:

        def flip(folders: Folders, name: str = name, seed: int = seed) -> None:
            path, chance = folders.file(name), random.Random(seed)
            raw = bytearray(path.read_bytes())
            end = 8 + int.from_bytes(raw[:8], "little")
            at = chance.randrange(end)
            if seed % 4:
                raw[at] ^= 1 << chance.randrange(8)
            else:
                raw[at : at + 16] = chance.randbytes(min(16, end - at))
            path.write_bytes(raw)

        # A tensor under another name is missed where the architecture's are known.
        yield Case(f"flipped-{name}-{seed}", flip, may_pass=True, verbs=LOWER)


def _lengths() -> Iterator[Case]:
    lengths = {"zero": 0, "one": 1, "2^63": 1 << 63, "2^64-1": (1 << 64) - 1, "beyond": 1 << 30, "limit": 100_000_001}
    for name, (word, length) in itertools.product((WEIGHTS, ADAPTER_WEIGHTS), lengths.items()):

        def set_length(folders: Folders, name: str = name, length: int = length) -> None:
            join_header(folders.file(name), *split_header(folders.file(name)), length)

        yield Case(f"header-length-{name}-{word}", set_length, name, "bad-safetensors", verbs=_one(name))
    for off in (-8, -1, 1, 8):

        def shift(folders: Folders, off: int = off) -> None:
            path = folders.file(WEIGHTS)
            raw = path.read_bytes()
            path.write_bytes(struct.pack("<Q", int.from_bytes(raw[:8], "little") + off) + raw[8:])

        yield Case(f"header-length-off-by-{off}", shift, WEIGHTS, "bad-safetensors", verbs=MERGE)


ENTRIES: dict[str, dict[str, Any]] = {
    "dtype-unknown": {"dtype": "F33"},
    "dtype-empty": {"dtype": ""},
    "dtype-list": {"dtype": ["BF16"]},
    "dtype-null": {"dtype": None},
    "dtype-number": {"dtype": 16},
    "dtype-object": {"dtype": {}},
    "dtype-other-width": {"dtype": "F64"},
    "shape-string": {"shape": "64"},
    "shape-null": {"shape": None},
    "shape-object": {"shape": {"0": 64}},
    "shape-number": {"shape": 64},
    "shape-negative": {"shape": [-64, -64]},
    "shape-float": {"shape": [64.0, 64]},
    "shape-bool": {"shape": [True, 64]},
    "shape-nested": {"shape": [[64], 64]},
    "shape-empty": {"shape": []},
    "shape-2^63": {"shape": [1 << 63]},
    "shape-overflows-to-0": {"shape": [1 << 32, 1 << 32]},
    "shape-overflows-with-0": {"shape": [0, 1 << 62, 1 << 62]},
    "shape-huge-power": {"shape": [(1 << 62) + 1] * 100_000},
    "shape-many-axes": {"shape": [1] * 100_000},
    "shape-too-large": {"shape": [HUGE, HUGE]},
    "offsets-null": {"data_offsets": None},
    "offsets-one": {"data_offsets": [0]},
    "offsets-three": {"data_offsets": [0, 1, 2]},
    "offsets-negative": {"data_offsets": [-128, 0]},
    "offsets-swapped": {"data_offsets": [128, 0]},
    "offsets-beyond": {"data_offsets": [1 << 40, (1 << 40) + 128]},
    "offsets-2^64": {"data_offsets": [1 << 64, (1 << 64) + 128]},
    "offsets-float": {"data_offsets": [0.0, 128.0]},
    "offsets-string": {"data_offsets": ["0", "128"]},
    "offsets-object": {"data_offsets": {"begin": 0, "end": 128}},
}
"""What is put into the header's entry of the first tensor."""


def _first(header: dict[str, Any]) -> str:
    return min((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])


def _entries() -> Iterator[Case]:
    for name, (word, change) in itertools.product((WEIGHTS, ADAPTER_WEIGHTS), ENTRIES.items()):

        def edit(folders: Folders, name: str = name, change: dict[str, Any] = change) -> None:
            header, data = split_header(folders.file(name))
            header[_first(header)] |= change
            join_header(folders.file(name), header, data)

        yield Case(f"entry-{name}-{word}", edit, name, "bad-safetensors", verbs=_one(name))


def _headers() -> Iterator[Case]:
    """Edits of the whole header: `(header, data) -> (header or bytes, data)`."""

    def entry(value: Any) -> Callable[[dict[str, Any], bytes], Any]:
        return lambda header, data: ({**header, _first(header): value}, data)

    def without(key: str) -> Callable[[dict[str, Any], bytes], Any]:
        def edit(header: dict[str, Any], data: bytes) -> Any:
            del header[_first(header)][key]
            return header, data

        return edit

    def overlap(header: dict[str, Any], data: bytes) -> Any:
        first = header[_first(header)]
        header["model.twin.weight"] = dict(first)
        return header, data

    def hole(header: dict[str, Any], data: bytes) -> Any:
        del header[_first(header)]
        return header, data

    def middle_hole(header: dict[str, Any], data: bytes) -> Any:
        names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        del header[names[len(names) // 2]]
        return header, data

    def twice(header: dict[str, Any], data: bytes) -> Any:
        name = _first(header)
        text = json.dumps(header)
        return (text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode(), data

    def key_twice(header: dict[str, Any], data: bytes) -> Any:
        text = json.dumps(header)
        return text.replace('"dtype":', '"dtype": "F64", "dtype":', 1).encode(), data

    def other_encoding(codec: str) -> Callable[[dict[str, Any], bytes], Any]:
        return lambda header, data: (json.dumps(header).encode(codec), data)

    edits: dict[str, Callable[[dict[str, Any], bytes], Any]] = {
        "entry-null": entry(None),
        "entry-list": entry([1, 2, 3]),
        "entry-string": entry("BF16"),
        "entry-empty": entry({}),
        "no-dtype": without("dtype"),
        "no-shape": without("shape"),
        "no-offsets": without("data_offsets"),
        "overlap": overlap,
        "hole-at-start": hole,
        "hole-in-middle": middle_hole,
        "tensor-twice": twice,
        "key-twice": key_twice,
        "data-behind": lambda header, data: (header, data + bytes(64)),
        "empty-object": lambda header, data: ({}, data),
        "list": lambda header, data: ([header], data),
        "null": lambda header, data: (b"null", data),
        "number": lambda header, data: (b"7", data),
        "deep": lambda header, data: (b"[" * DEEP, data),
        "deep-objects": lambda header, data: (b'{"a":' * DEEP, data),
        "not-json": lambda header, data: (b"{not json", data),
        "two-documents": lambda header, data: (json.dumps(header).encode() + b"{}", data),
        "nan": lambda header, data: (json.dumps(header).replace("[", "[NaN, ", 1).encode(), data),
        "long-number": lambda header, data: (json.dumps(header).replace("[", "[" + "9" * 10_000 + ", ").encode(), data),
        "byte-order-mark": other_encoding("utf-8-sig"),
        "utf-16": other_encoding("utf-16"),
        "utf-32": other_encoding("utf-32"),
        "not-utf-8": lambda header, data: (json.dumps(header).encode().replace(b"model", b"mod\xff\xfe", 1), data),
        "metadata-list": lambda header, data: ({**header, "__metadata__": ["pt"]}, data),
        "metadata-of-numbers": lambda header, data: ({**header, "__metadata__": {"format": 7}}, data),
        "metadata-nested": lambda header, data: ({**header, "__metadata__": {"a": {"b": {}}}}, data),
    }
    for name, (word, change) in itertools.product((WEIGHTS, ADAPTER_WEIGHTS), edits.items()):

        def edit(folders: Folders, name: str = name, change: Callable[..., Any] = change) -> None:
            path = folders.file(name)
            join_header(path, *change(*split_header(path)))

        yield Case(f"header-{name}-{word}", edit, name, "bad-safetensors", verbs=_one(name))


def _names() -> Iterator[Case]:
    """Sound files whose tensors are called something else, or are missing."""
    names = {
        "empty": "",
        "escape-codes": "\x1b[2J\x1b]0;owned\x07model",
        "newlines": "model\nerror[fake]: all is well",
        "nul": "model\x00weight",
        "surrogate": "model\ud800",
        "long": "x" * 1_000_000,
        "not-ours": "model.layers.999999999999.mlp.gate_proj.weight",
        "right-to-left": "\u202emodel",
    }
    for name, (word, new) in itertools.product((WEIGHTS, ADAPTER_WEIGHTS), names.items()):

        def rename(folders: Folders, name: str = name, new: str = new) -> None:
            header, data = split_header(folders.file(name))
            old = _first(header)
            join_header(folders.file(name), {new if key == old else key: value for key, value in header.items()}, data)

        verbs = BOTH if name == ADAPTER_WEIGHTS else LOWER  # what a base holds beside its model is copied
        yield Case(f"name-{name}-{word}", rename, verbs=verbs, may_pass=False)


def _values() -> Iterator[Case]:
    """NaN and infinity in the weights, and a file of a size that nobody wants to read."""
    for name, word, value in itertools.product(
        (WEIGHTS, ADAPTER_WEIGHTS), ("nan", "infinity"), (b"\xff\xff\xff\x7f", b"\x80\x7f\x80\x7f")
    ):

        def spoil(folders: Folders, name: str = name, value: bytes = value) -> None:
            path = folders.file(name)
            raw = bytearray(path.read_bytes())
            raw[-4:] = value
            path.write_bytes(raw)

        yield Case(f"value-{name}-{word}-{value.hex()}", spoil)

    def sparse(folders: Folders, name: str) -> None:
        """A terabyte that takes no disk: one tensor's rows were multiplied."""
        path = folders.file(name)
        header, _ = split_header(path)
        last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        begin, end = header[last]["data_offsets"]
        rows = (1 << 40) // ((end - begin) // header[last]["shape"][0])
        size = (end - begin) // header[last]["shape"][0] * rows
        header[last]["shape"][0], header[last]["data_offsets"] = rows, [begin, begin + size]
        join_header(path, header, b"")
        os.truncate(path, path.stat().st_size + begin + size)

    for name in (WEIGHTS, ADAPTER_WEIGHTS):
        yield Case(f"terabyte-{name}", lambda folders, name=name: sparse(folders, name))  # type: ignore[misc]


# ---------------------------------------------------------------- files of JSON

JSON_FILES = (CONFIG, INDEX, TOKENIZER, TOKENIZER_CONFIG, GENERATION, ADAPTER_CONFIG)
TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "half": lambda text: text[: len(text) // 2],
    "null": lambda text: b"null",
    "list": lambda text: b"[" + text + b"]",
    "string": lambda text: b'"config"',
    "number": lambda text: b"7",
    "byte-order-mark": lambda text: b"\xef\xbb\xbf" + text,
    "utf-16": lambda text: text.decode().encode("utf-16"),
    "not-utf-8": lambda text: text.replace(b'": ', b'\xff": ', 1),
    "nul-bytes": lambda text: bytes(len(text)),
    "deep": lambda text: b'{"a":' * DEEP,
    "deep-value": lambda text: b'{"auto_map":' + b"[" * DEEP + b"]" * DEEP + b"," + text.lstrip()[1:],
    "long-number": lambda text: b'{"size":' + b"9" * 10_000 + b"," + text.lstrip()[1:],
    "two-documents": lambda text: text + text,
    "trailing-comma": lambda text: text.rstrip()[:-1] + b",}",
    "single-quotes": lambda text: text.replace(b'"', b"'"),
    "bomb": lambda text: b'{"a":[' + b"[]," * 20_000_000 + b"[]]," + text.lstrip()[1:],
}


def _texts() -> Iterator[Case]:
    for name, (word, change) in itertools.product(JSON_FILES, TEXTS.items()):

        def edit(folders: Folders, name: str = name, change: Callable[[bytes], bytes] = change) -> None:
            path = folders.file(name)
            path.write_bytes(change(path.read_bytes()))

        yield Case(f"json-{name}-{word}", edit, name, sharded=name == INDEX)


def _nodes() -> Iterator[Case]:
    """Something else where a file is expected."""

    def node(make: Callable[[Path], object]) -> Callable[[Folders, str], None]:
        def replace(folders: Folders, name: str) -> None:
            path = folders.file(name)
            path.unlink()
            make(path)

        return replace

    def sparse(path: Path) -> None:
        path.touch()
        os.truncate(path, 1 << 40)

    makers: dict[str, Callable[[Path], object]] = {
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
        "loop": lambda path: path.symlink_to(path.name),
        "dangling": lambda path: path.symlink_to("nowhere"),
        "endless": lambda path: path.symlink_to("/dev/zero"),
        "unreadable": lambda path: path.symlink_to("/proc/self/mem"),  # rights do not stop root
        "terabyte-of-zeros": sparse,
    }
    names = (WEIGHTS, *JSON_FILES, ADAPTER_WEIGHTS)
    for name, (word, make) in itertools.product(names, makers.items()):
        yield Case(
            f"node-{name}-{word}",
            lambda folders, name=name, make=make: node(make)(folders, name),  # type: ignore[misc]
            sharded=name == INDEX,
        )


# ---------------------------------------------------------------- values of JSON


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the object in `path`."""
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


_COUNT = ("64", -1, 0, 1.5, True, [], {}, float("nan"))
_FLAG = ("false", 0, [], {"a": 1})
_NUMBER = ("x", True, [], {}, float("nan"), float("inf"))
_TEXT = (7, True, ["x"], {"a": 1})
_NAMES = (7, True, [7], [None], [["q_proj"]], {"a": 1})
_IDS = ("x", 1.5, True, ["x"], [None], {"a": 1}, 1 << 70)
WRONG: dict[str, dict[str, tuple[Any, ...]]] = {
    CONFIG: {
        "hidden_size": (*_COUNT, HUGE, 1 << 70),
        "intermediate_size": (*_COUNT, HUGE),
        "num_hidden_layers": (*_COUNT, HUGE),
        "num_attention_heads": (*_COUNT, HUGE),
        "num_key_value_heads": (*_COUNT, HUGE, 3),
        "head_dim": (*_COUNT, HUGE),
        "vocab_size": (*_COUNT, HUGE),
        "max_position_embeddings": (*_COUNT, HUGE, 1 << 70),
        "rms_norm_eps": (*_NUMBER, -1, 10**400),
        "rope_theta": _NUMBER,
        "rope_scaling": ("x", 7, [1], {"type": "linear", "factor": "2"}, {"type": "yarn", "factor": float("nan")}),
        "rope_parameters": ("x", 7, [1], {"rope_theta": "x"}, {"rope_theta": [1]}, {"rope_type": "linear"},
                            {"rope_type": ["linear"]}, {"rope_theta": float("inf")}, {"full_attention": 7}),
        "sliding_window": ("x", 1.5, [], {}, -4),
        "use_sliding_window": _FLAG,
        "tie_word_embeddings": _FLAG,
        "layer_types": ("full_attention", 7, [7], [["x"]], {}),
        "hidden_act": _TEXT,
        "model_type": _TEXT,
        "architectures": ("Qwen2ForCausalLM", 7, [], [7], [None], [[]], {"a": 1}, None),
        "bos_token_id": _IDS,
        "eos_token_id": _IDS,
        "pad_token_id": _IDS,
        "quantization_config": ("gptq", 7, ["gptq"], {"quant_method": 7}, {"quant_method": "gptq"}),
    },
    ADAPTER_CONFIG: {
        "peft_type": (*_TEXT, None, "", "LORA\x00", "NOT_A_KIND"),
        "task_type": (*_TEXT, "NOT_A_TASK"),
        "r": ("4", -4, 0, 4.5, True, [4], {}, None, 10**9, 10**400, float("nan"), float("inf")),
        "lora_alpha": ("8", True, [8], {}, None, 10**400, 1e308, float("nan"), float("inf")),
        "rank_pattern": ("x", 7, ["q_proj"], {"q_proj": "4"}, {"q_proj": -1}, {"q_proj": 10**9}, {"(": 4},
                         {"q_proj": float("nan")}, {"q_proj": None}, {"q_proj": True}),
        "alpha_pattern": ("x", 7, ["q_proj"], {"q_proj": "4"}, {"q_proj": float("nan")}, {"q_proj": 1e308},
                          {"q_proj": float("inf")}, {"(": 4}, {"q_proj": None}, {"q_proj": True}, {"q_proj": 10**400}),
        "target_modules": _NAMES,
        "modules_to_save": ("embed_tokens", *_NAMES, [""]),
        "exclude_modules": _NAMES,
        "target_parameters": ("x", *_NAMES),
        "layers_to_transform": ("x", 1.5, ["x"], {"a": 1}, [-1.5]),
        "layer_replication": ("x", 7, [7], [["x", "y"]], {"a": 1}, [[0, HUGE]]),
        "trainable_token_indices": ("x", 1.5, ["x"], {"embed_tokens": "x"}, [HUGE], [-1]),
        "use_rslora": _FLAG,
        "use_dora": _FLAG,
        "lora_bias": _FLAG,
        "fan_in_fan_out": _FLAG,
        "ensure_weight_tying": _FLAG,
        "bias": (7, True, ["none"], "some", {"a": 1}),
        "init_lora_weights": (7, ["x"], {"a": 1}, "pissa_niter_4", "unheard_of"),
        "base_model_name_or_path": _TEXT,
        "revision": _TEXT,
    },
    GENERATION: {"eos_token_id": _IDS, "bos_token_id": _IDS, "pad_token_id": _IDS},
    TOKENIZER_CONFIG: {
        "eos_token": (7, True, ["x"], {"content": 7}, {"content": None}),
        "pad_token": (7, True, ["x"], {"content": 7}),
        "add_bos_token": _FLAG,
        "chat_template": (7, True, {"a": 1}, [7], [None], [{"name": 7}], [{"template": "x"}],
                          [{"name": "default", "template": 7}]),
    },
}  # fmt: skip
"""Values of the wrong type, and numbers beyond all measure, for every key that is read."""


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:20]}-{len(text)}"


def _wrong() -> Iterator[Case]:
    for name, keys in WRONG.items():
        for key, values in keys.items():
            for number, value in enumerate(values):

                def edit(folders: Folders, name: str = name, key: str = key, value: Any = value) -> None:
                    (folders.base / "chat_template.jinja").unlink()  # it would win over tokenizer_config's
                    edit_json(folders.file(name), lambda data: data.update({key: value}))

                of_right_type = value == 3 or value == {"rope_type": "linear"}  # a copy is no worse than the original
                verbs = LOWER if number % 2 or of_right_type else MERGE
                yield Case(f"value-{name}-{key}-{_show(value)}", edit, verbs=verbs)


def _patterns() -> Iterator[Case]:
    """Regular expressions that take for ever: PEFT's patterns are matched against every module's path."""
    evil = (
        "(a+)+$", "(.*)*x", "(.+)+(.+)+(.+)+y", "([a-z_.0-9]+)*!", "((.*)*)*b", "(x+x+)+y", "(?:.|.)*z{3}",
        ".?" * 40 + "!", "(m|m|o|d)?" * 12 + "!", ".*" * 12 + "!", "(.?){40}!", "(" * 50_000, "x{4294967296}",
    )  # fmt: skip
    for key, (number, pattern) in itertools.product(("rank_pattern", "alpha_pattern"), enumerate(evil)):

        def edit(folders: Folders, key: str = key, pattern: str = pattern) -> None:
            edit_json(folders.file(ADAPTER_CONFIG), lambda data: data.update({key: {pattern: 4}}))

        yield Case(f"regex-{key}-{number}", edit, may_pass=True)
    for number, pattern in enumerate(evil):

        def target(folders: Folders, pattern: str = pattern) -> None:
            edit_json(folders.file(ADAPTER_CONFIG), lambda data: data.update(target_modules=pattern))

        yield Case(f"regex-target_modules-{number}", target, may_pass=True, verbs=MERGE)


# ---------------------------------------------------------------- index, tokenizer, folders


def _indexes() -> Iterator[Case]:
    def mapped(change: Callable[[dict[str, str], Path], object]) -> Callable[[Folders], None]:
        def edit(folders: Folders) -> None:
            edit_json(folders.base / INDEX, lambda data: change(data["weight_map"], folders.base))

        return edit

    def moved(to: str, outside: str | None = None) -> Callable[[Folders], None]:
        """Sends one shard's tensors to the path `to`, where a copy of that shard lies."""

        def edit(folders: Folders) -> None:
            data = json.loads((folders.base / INDEX).read_text())
            shard = min(data["weight_map"].values())
            target = to.replace("BASE", str(folders.base))
            if outside is not None:
                place = folders.base / outside
                place.parent.mkdir(exist_ok=True)
                place.write_bytes((folders.base / shard).read_bytes())
            data["weight_map"] = {key: target if value == shard else value for key, value in data["weight_map"].items()}
            (folders.base / INDEX).write_text(json.dumps(data))

        return edit

    paths = {
        "parent": moved("../stolen.safetensors", "../stolen.safetensors"),
        "absolute": moved("BASE/stolen.safetensors", "stolen.safetensors"),
        "folder-below": moved("below/stolen.safetensors", "below/stolen.safetensors"),
        "dots": moved("./stolen.safetensors", "stolen.safetensors"),
        "passwd": moved("/etc/passwd"),
        "up-passwd": moved("../../../../../../etc/passwd"),
        "endless": moved("/dev/zero"),
        "empty-name": moved(""),
        "dot": moved("."),
        "dot-dot": moved(".."),
        "nul": moved("model\x00.safetensors"),
        "surrogate": moved("model\ud800.safetensors"),
        "escape-codes": moved("\x1b[2J.safetensors"),
        "long-name": moved("x" * 1_000_000),
        "config": moved("config.json"),
        "no-shards": mapped(lambda names, base: names.clear()),
        "null-shard": mapped(lambda names, base: names.update({min(names): None})),
        "number-shard": mapped(lambda names, base: names.update({min(names): 7})),
        "list-shard": mapped(lambda names, base: names.update({min(names): [names[min(names)]]})),
        "many-shards": mapped(lambda names, base: names.update({f"t{i}": f"s{i}.safetensors" for i in range(20_000)})),
        "unknown-tensor": mapped(lambda names, base: names.update({"model.more": min(names.values())})),
        "other-shard": mapped(lambda names, base: names.update(dict.fromkeys(names, min(names.values())))),
    }
    for word, damage in paths.items():
        yield Case(f"index-{word}", damage, sharded=True)
    for value in (None, 7, "x", [], ["a"], {}, True):

        def set_map(folders: Folders, value: Any = value) -> None:
            edit_json(folders.base / INDEX, lambda data: data.update(weight_map=value))

        yield Case(f"index-weight_map-{_show(value)}", set_map, INDEX, sharded=True)

    def shards(folders: Folders) -> list[Path]:
        return sorted(folders.base.glob("model-*.safetensors"))

    def twin(folders: Folders) -> None:
        """One tensor in two shards."""
        one, other = shards(folders)[:2]
        header, data = split_header(other)
        mine, content = split_header(one)
        name = _first(mine)
        begin, end = mine[name]["data_offsets"]
        header[name] = {**mine[name], "data_offsets": [len(data), len(data) + end - begin]}
        join_header(other, header, data + content[begin:end])

    def lost(folders: Folders) -> None:
        """A tensor that neither shard nor index has any more."""
        path = shards(folders)[-1]
        header, data = split_header(path)
        last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        begin, _ = header.pop(last)["data_offsets"]
        join_header(path, header, data[:begin])
        edit_json(folders.base / INDEX, lambda data: data["weight_map"].pop(last))

    def shard_node(make: Callable[[Path], object]) -> Callable[[Folders], None]:
        def replace(folders: Folders) -> None:
            path = shards(folders)[0]
            path.unlink()
            make(path)

        return replace

    yield Case("shards-twin", twin, "two files", "tensor-twice", sharded=True)
    yield Case("shards-lost-tensor", lost, sharded=True, verbs=LOWER)
    yield Case("shards-lost-file", lambda folders: shards(folders)[1].unlink(), code="missing-shard", sharded=True)
    yield Case("shards-swapped", lambda folders: _swap(*shards(folders)[:2]), sharded=True)
    yield Case("shards-folder", shard_node(Path.mkdir), code="missing-shard", sharded=True)
    yield Case("shards-pipe", shard_node(os.mkfifo), code="missing-shard", sharded=True)
    yield Case("shards-loop", shard_node(lambda path: path.symlink_to(path.name)), sharded=True)


def _swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _tokenizers() -> Iterator[Case]:
    def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Folders], None]:
        return lambda folders: edit_json(folders.base / TOKENIZER, change)

    def vocab(index: Any) -> Callable[[Folders], None]:
        return edited(lambda data: data["model"]["vocab"].update({"zz": index}))

    def added(**change: Any) -> Callable[[Folders], None]:
        return edited(lambda data: data["added_tokens"][-1].update(change))

    def raw(old: bytes, new: bytes) -> Callable[[Folders], None]:
        def edit(folders: Folders) -> None:
            path = folders.base / TOKENIZER
            text = path.read_bytes()
            assert old in text
            path.write_bytes(text.replace(old, new, 1))

        return edit

    everywhere: dict[str, Callable[[Folders], None]] = {
        **{f"id-{_show(index)}": vocab(index) for index in (10**7, 10**30, -1, 1.5, "7", None, True, [], {})},
        "id-of-many-digits": raw(b'"vocab": {', b'"vocab": {"zz": ' + b"9" * 100_000 + b", "),
        **{f"added-id-{_show(index)}": added(id=index) for index in (10**7, 10**30, -1, 1.5, "7", None, True, [], {})},
        "added-id-of-many-digits": raw(b'"id": ', b'"id": ' + b"9" * 100_000),
        "added-without-id": edited(lambda data: data["added_tokens"][0].pop("id")),
        "added-deep": raw(b'"added_tokens": [', b'"added_tokens": [' + b"[" * DEEP + b"]" * DEEP + b", "),
        **{f"added-{_show(value)}": edited(lambda data, value=value: data.update(added_tokens=value))  # type: ignore[misc]
           for value in (7, "x", [7], [None], [[]], {"a": 1})},
        **{f"model-{_show(value)}": edited(lambda data, value=value: data.update(model=value))  # type: ignore[misc]
           for value in (None, 7, "x", [], {})},
        **{f"vocab-{_show(value)}": edited(lambda data, value=value: data["model"].update(vocab=value))  # type: ignore[misc]
           for value in (None, 7, "x", [], {}, [7])},
        "unigram-deep": raw(b'"vocab": {', b'"vocab": [' + b"[" * DEEP),
        "vocabulary-of-tens-of-millions": raw(b'"vocab": {', b'"vocab": {' + b'"x":99999999,' * 5_000_000),
    }  # fmt: skip
    for word, damage in everywhere.items():
        yield Case(f"tokenizer-{word}", damage, TOKENIZER if "many-digits" in word or "deep" in word else "")
    lowered: dict[str, Callable[[Folders], None]] = {
        **{f"content-{_show(value)}": added(content=value) for value in (7, None, [], {})},
        **{f"merges-{_show(value)}": edited(lambda data, value=value: data["model"].update(merges=value))  # type: ignore[misc]
           for value in (7, "x", [7], ["a"], [["a", "b", "c"]], [["a", 7]], {"a": 1})},
        **{f"{key}-{_show(value)}": edited(lambda data, key=key, value=value: data.update({key: value}))  # type: ignore[misc]
           for key, value in itertools.product(("normalizer", "pre_tokenizer", "post_processor"), (7, "x", [7]))},
        **{f"steps-{_show(value)}": edited(lambda data, value=value: data["pre_tokenizer"].update(pretokenizers=value))  # type: ignore[misc]
           for value in (7, "x", [7], [None], {})},
        **{f"pattern-{_show(value)}": edited(lambda data, value=value: data["pre_tokenizer"]["pretokenizers"][0].update(pattern=value))  # type: ignore[misc]  # noqa: E501
           for value in (7, "x", [7], None, {"Regex": 7}, {"Regex": "(a+)+$"})},
        "type": edited(lambda data: data["model"].update(type=["BPE"])),
        "unk": edited(lambda data: data["model"].update(byte_fallback=True)),
    }  # fmt: skip
    for word, damage in lowered.items():
        yield Case(f"tokenizer-{word}", damage, verbs=LOWER)


def _folders() -> Iterator[Case]:
    """Whole folders that are something else."""

    def gone(path: Path) -> Path:
        path.rename(path.with_name(f"{path.name}.away"))
        return path

    makers: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "file": Path.touch,
        "pipe": os.mkfifo,
        "empty": Path.mkdir,
        "loop": lambda path: path.symlink_to(path.name),
        "device": lambda path: path.symlink_to("/dev/zero"),
    }
    for which, (word, make) in itertools.product(("base", "adapter"), makers.items()):
        yield Case(
            f"folder-{which}-{word}",
            lambda folders, which=which, make=make: make(gone(getattr(folders, which))),  # type: ignore[misc]
            code=f"no-{'checkpoint' if which == 'base' else 'adapter'}",
        )

    def swapped(folders: Folders) -> None:
        away = folders.base.with_name("away")
        folders.base.rename(away)
        folders.adapter.rename(folders.base)
        away.rename(folders.adapter)

    yield Case("folder-swapped", swapped)
    templates = {
        "syntax": b"{% for %}",
        "billion": b"{% for a in range(10**9) %}x{% endfor %}",
        "large": b"{{ 'x' * 10**11 }}",
        "deep": b"{{ " + b"(" * 5000 + b")" * 5000 + b" }}",
        "escape": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "not-utf-8": b"\xff\xfe",
    }
    for word, text in templates.items():

        def write(folders: Folders, text: bytes = text) -> None:
            (folders.base / "chat_template.jinja").write_bytes(text)

        yield Case(f"template-{word}", write, verbs=LOWER)


def _endless_templates() -> Iterator[Case]:
    """Chat templates that do not end, or take all memory: while they are parsed, or while they are rendered."""
    loop = "{% for a in range(99999) %}"
    templates = {
        "loops": loop * 3 + "x" + "{% endfor %}" * 3,
        "loops-that-write": loop * 2 + "{{ 'x' * 1000 }}" + "{% endfor %}" * 2,
        "power": "{{ 9 ** (9 ** 9) }}",
        "power-of-variable": "{{ messages | length ** (9 ** 9 + messages | length) }}",
        "power-at-run-time": "{% set n = 9 + messages | length %}{{ n ** (n ** n) }}",
        "text": "{{ 'x' * 10 ** 10 }}",
        "text-at-run-time": "{{ messages[0].content * 10 ** 10 }}",
        "text-that-fits": "{{ messages[0].content * 10 ** 7 }}",
        "doubling": "{% set ns = namespace(t='x') %}{% for a in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "padding": "{{ '%999999999999d' % 7 }}{{ '{:9999999999}'.format(7) }}",
        "recursion": "{% macro f(n) %}{{ f(n) ~ f(n) }}{% endmacro %}{% for a in range(99999) %}"
        "{% for b in range(99999) %}{{ 'a' | upper }}{% endfor %}{% endfor %}",
    }
    for word, template in templates.items():

        def write(folders: Folders, template: str = template) -> None:
            (folders.base / "chat_template.jinja").write_text(template)

        yield Case(f"endless-template-{word}", write, "chat template", "chat-template-refused")


CASES: tuple[Case, ...] = tuple(
    itertools.chain(
        _truncated(), _flipped(), _lengths(), _entries(), _headers(), _names(), _values(), _texts(), _nodes(),
        _wrong(), _patterns(), _indexes(), _tokenizers(), _folders(), _endless_templates(),
    )
)  # fmt: skip
