"""A classifier's data: lines, classes, split, encoding. The tokenizer is checked against transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import LabelledItem, TokenizerFiles
from lora2edge.errors import CheckpointError, DataError, UnsupportedError
from lora2edge.texts import (
    LabelledReader,
    TextEncoder,
    check_classes,
    class_names,
    labelled_digest,
    load_labelled,
    longest_text,
    read_labelled,
    segment_count,
    write_labelled,
)
from tests.classifiers import CLASSES, TAGS, make_classifier, make_labelled_data, make_tagged_data, wordpiece_tokenizer
from tests.tiny import VOCAB, bpe_tokenizer

SEQUENCE, TOKENS = "sequence-classification", "token-classification"


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def files(folder: Path) -> TokenizerFiles:
    return TokenizerFiles({path.name: path for path in folder.iterdir()})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            {"text": "a", "label": "cold"},
            'the label "cold" is none of the classes in config.json: fever, fracture, rash',
        ),
        ({"text": "a", "label": 3}, "the label 3 is none of the classes"),
        ({"text": "a", "label": True}, "the label true is none"),
        ({"text": "a", "label": None}, "the label null is none"),
        ({"text": "a"}, "needs text and label; its keys: text"),
        ({"text": " ", "label": 0}, "the text is empty"),
        ({"text": 5, "label": 0}, "text must be a string, it is int"),
        ({"text": "a", "text_pair": 5, "label": 0}, "text_pair must be a string"),
        (["a"], "a line must be an object"),
        ("{\n", "not JSON"),
    ],
)
def test_a_bad_text_is_told_with_its_line(tmp_path: Path, line: Any, reason: str) -> None:
    path = write(tmp_path / "d.jsonl", {"text": "fine", "label": "rash"}, line)
    with pytest.raises(DataError) as caught:
        LabelledReader(CLASSES, SEQUENCE).read(path)
    assert caught.value.code == "bad-line" and f"{path}:2: {reason}" in caught.value.why
    assert '"label": "fever"' in caught.value.hint


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"tokens": ["a", "b"], "labels": ["O"]}, "2 tokens and 1 labels"),
        ({"tokens": [], "labels": []}, "tokens is empty"),
        ({"tokens": "a b", "labels": ["O", "O"]}, "tokens and labels must be lists"),
        ({"tokens": ["a", 5], "labels": ["O", "O"]}, "tokens[1] must be a string"),
        (
            {"tokens": ["a"], "labels": ["B-DOSE"]},
            'the label "B-DOSE" is none of the classes in config.json: O, B-DRUG',
        ),
        ({"text": "a", "label": "O"}, "needs tokens and labels; its keys: label, text"),
    ],
)
def test_bad_words_are_told_with_their_line(tmp_path: Path, line: Any, reason: str) -> None:
    path = write(tmp_path / "d.jsonl", line)
    with pytest.raises(DataError) as caught:
        LabelledReader(TAGS, TOKENS).read(path)
    assert f"{path}:1: {reason}" in caught.value.why


def test_five_bad_lines_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[{"text": "a", "label": "cold"}] * 7)
    with pytest.raises(DataError) as caught:
        LabelledReader(CLASSES, SEQUENCE).read(path)
    assert (
        caught.value.why.count("cold") == 5
        and "and 2 more" in caught.value.why
        and "7 of the lines" in caught.value.what
    )


def test_numbers_that_may_be_names_are_refused(tmp_path: Path) -> None:
    """1 of the classes "1" to "5" is the first by name and the second by index: a guess would be silent."""
    stars = tuple("12345")
    path = write(tmp_path / "d.jsonl", {"text": "a", "label": 1})
    with pytest.raises(DataError, match="1 of the lines"):
        LabelledReader(stars, SEQUENCE).read(path)
    assert LabelledReader(stars, SEQUENCE).read(write(path, {"text": "a", "label": "1"}))[0].gold == (0,)
    assert LabelledReader(tuple("01"), SEQUENCE).read(write(path, {"text": "a", "label": 1}))[0].gold == (1,)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({}, ("LABEL_0", "LABEL_1")),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
    ],
)
def test_classes_are_in_the_order_of_the_logits(config: dict[str, Any], names: tuple[str, ...]) -> None:
    assert class_names(config) == names


@pytest.mark.parametrize("labels", [{"0": "a", "2": "b"}, {"0": "a", "1": "a"}, {"x": "a"}, ["a"]])
def test_broken_labels(labels: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        class_names({"id2label": labels})
    assert caught.value.code == "bad-labels"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"problem_type": "multi_label_classification"}, "classifier-multi-label"),
        ({"id2label": {"0": "score"}}, "classifier-regression"),
        ({"problem_type": "regression"}, "classifier-regression"),
    ],
)
def test_what_is_no_choice_of_one_class_is_refused(tmp_path: Path, config: dict[str, Any], code: str) -> None:
    folder = make_classifier(tmp_path / "base")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **config}))
    with pytest.raises(UnsupportedError) as caught:
        check_classes(open_checkpoint(folder))
    assert caught.value.code == code


def test_texts_and_pairs_are_encoded_as_transformers_does(tmp_path: Path) -> None:
    wordpiece_tokenizer().save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = TextEncoder(files(tmp_path), segments=2)
    for pair in (("A swollen wrist, room 7.", None), ("Itching skin", "red spots on the arm"), ("[SEP] ünïcode", "")):
        expected = theirs(*[[text] for text in pair if text is not None])  # in batches, as data sets are made ready
        found = ours.encode(*pair)
        assert list(found.ids) == expected["input_ids"][0]
        assert list(found.types or [0] * len(found.ids)) == expected["token_type_ids"][0]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["model_input_names"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    without = AutoTokenizer.from_pretrained(tmp_path)("a", "b")
    assert "token_type_ids" not in without and not TextEncoder(files(tmp_path), segments=2).encode("a", "b").types
    assert ours.encode("a", "b").types and not TextEncoder(files(tmp_path), segments=0).encode("a", "b").types


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_words_carry_their_class_on_their_first_token(tmp_path: Path, kind: str) -> None:
    """As transformers' `word_ids` has it; words of a byte-level tokenizer get the space that it demands of them."""
    if kind == "bert":
        wordpiece_tokenizer().save_pretrained(tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
    else:
        from tokenizers import pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        inner = type(bpe_tokenizer(VOCAB - 8).backend_tokenizer).from_str(
            bpe_tokenizer(VOCAB - 8).backend_tokenizer.to_str()
        )
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        theirs = PreTrainedTokenizerFast(tokenizer_object=inner)
    words = ("The", "patient", "takes", "acetylsalicylic", "acid", "\u200b", "daily")
    item = LabelledItem((0, 0, None, 1, 2, 0, 0), words=words)
    sample = TextEncoder(files(tmp_path), 2).sample(item)
    expected = theirs(list(words), is_split_into_words=True)
    assert list(sample.ids) == expected["input_ids"]
    first: dict[int, int] = {}
    for place, word in enumerate(expected.word_ids()):
        if word is not None:
            first.setdefault(word, place)
    wanted = [(first[word], gold) for word, gold in enumerate(item.gold) if gold is not None and word in first]
    assert list(zip(sample.positions, sample.targets, strict=True)) == wanted


def test_a_text_is_on_one_side_whatever_its_class(tmp_path: Path) -> None:
    wordpiece_tokenizer().save_pretrained(tmp_path)
    data = make_labelled_data(tmp_path / "d.jsonl", 80)
    with data.open("a") as file:
        for line in data.read_text().splitlines():
            twin = {**json.loads(line), "label": "rash"}
            file.write(json.dumps({**twin, "text": "  " + twin["text"].upper()}) + "\n")
        file.write(json.dumps({"text": "word " * 90, "label": "rash"}) + "\n")
    reader, encoder = LabelledReader(CLASSES, SEQUENCE), TextEncoder(files(tmp_path), 2)
    texts = load_labelled(str(data), reader, encoder, max_length=60, calibration_tokens=10**6, test_tokens=10**6)
    keys = [{" ".join(sample.item.text.lower().split()) for sample in side} for side in (texts.calibration, texts.test)]
    assert keys[0] and keys[1] and not keys[0] & keys[1]
    assert texts.notes["calibration"]["too_long"] + texts.notes["test"]["too_long"] == 1
    for side, samples in (("calibration", texts.calibration), ("test", texts.test)):
        counts = {name: sum(sample.targets == (index,) for sample in samples) for index, name in enumerate(CLASSES)}
        assert texts.notes[side]["classes"] == counts
        assert set(texts.notes[side]["labels"]) == {"ward"}
    few = load_labelled(str(data), reader, encoder, max_length=60, calibration_tokens=20, test_tokens=3)
    assert len(few.test) == 3 and sum(len(sample.ids) for sample in few.calibration[:-1]) < 20
    assert few.test == texts.test[:3]


def test_stored_samples_come_back(tmp_path: Path) -> None:
    wordpiece_tokenizer().save_pretrained(tmp_path)
    reader = LabelledReader(TAGS, TOKENS)
    data = make_tagged_data(tmp_path / "d.jsonl")
    texts = load_labelled(
        str(data), reader, TextEncoder(files(tmp_path), 2), max_length=99, calibration_tokens=10**6, test_tokens=10**6
    )
    write_labelled(tmp_path / "samples.jsonl", texts.test)
    assert read_labelled(tmp_path / "samples.jsonl") == texts.test
    assert labelled_digest(texts.test) == labelled_digest(read_labelled(tmp_path / "samples.jsonl"))
    unscored = [sample for sample in texts.calibration + texts.test if None in sample.item.gold]
    assert unscored and all(len(sample.positions) == len(sample.item.words) - 1 for sample in unscored)


def test_how_long_a_text_may_be(tmp_path: Path) -> None:
    """RoBERTa's positions begin behind its padding's."""
    bert = open_checkpoint(make_classifier(tmp_path / "bert"))
    roberta = open_checkpoint(make_classifier(tmp_path / "roberta", "roberta"))
    assert (longest_text(bert), longest_text(roberta)) == (96, 94)
    assert (segment_count(bert), segment_count(roberta)) == (2, 1)


def test_indices_that_two_tables_disagree_on_are_refused() -> None:
    """Training scripts number the classes by label2id, and read predictions by id2label."""
    names = {"0": "negative", "1": "positive"}
    with pytest.raises(CheckpointError) as caught:
        class_names({"id2label": names, "label2id": {"negative": 1, "positive": 0}})
    assert caught.value.code == "bad-labels" and "'negative' is class 0 there, and 1 in label2id" in caught.value.why
    for other in ({"positive": 1, "negative": "0"}, {"LABEL_0": 1, "LABEL_1": 0}, {}, None):
        assert class_names({"id2label": names, "label2id": other}) == ("negative", "positive")


def test_positions_begin_at_2_where_no_padding_is_named(tmp_path: Path) -> None:
    import transformers

    folder = make_classifier(tmp_path / "roberta", "roberta")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["pad_token_id"]
    path.write_text(json.dumps(config))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.roberta.embeddings.padding_idx == 1
    assert longest_text(open_checkpoint(folder)) == 94


def test_a_negative_padding_id_names_none(tmp_path: Path) -> None:
    """With it, transformers reads the class from the padding, without an error."""
    folder = make_classifier(tmp_path / "llama", "llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": -1}))
    with pytest.raises(CheckpointError) as caught:
        check_classes(open_checkpoint(folder))
    assert caught.value.code == "no-pad-token"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"tokenizer_class": "BertTokenizer", "do_lower_case": False}, "do_lower_case"),
        ({"tokenizer_class": "DistilBertTokenizerFast", "do_lower_case": False}, "do_lower_case"),
        ({"tokenizer_class": "BertTokenizer", "strip_accents": False}, "strip_accents"),
        ({"tokenizer_class": "BertTokenizer", "tokenize_chinese_chars": False}, "tokenize_chinese_chars"),
        ({"tokenizer_class": "BertTokenizer"}, ""),
        ({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": True}, ""),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}, ""),
    ],
)
def test_a_tokenizer_of_two_minds_is_refused(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    """transformers follows tokenizer_config.json, and tokenizer.json alone gives other tokens; or both agree."""
    wordpiece_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    text = "Chills since 今日 and chílls"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs(text)["input_ids"]
    if key:
        alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert [alone.id_to_token(token) for token in expected] != alone.encode(text).tokens
        with pytest.raises(CheckpointError) as caught:
            TextEncoder(files(tmp_path), 2)
        assert caught.value.code == "tokenizer-contradiction" and caught.value.what.startswith(f"{key} is")
        theirs.save_pretrained(tmp_path)  # the hint
    assert list(TextEncoder(files(tmp_path), 2).encode(text).ids) == expected


def test_a_space_that_only_one_file_asks_for_is_refused(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    bpe_tokenizer(VOCAB - 8).save_pretrained(tmp_path)
    inner = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "RobertaTokenizer"}
    path.write_text(json.dumps(config | {"add_prefix_space": False}))
    TextEncoder(files(tmp_path), 1)
    path.write_text(json.dumps(config | {"add_prefix_space": True}))
    with pytest.raises(CheckpointError) as caught:
        TextEncoder(files(tmp_path), 1)
    assert caught.value.code == "tokenizer-contradiction" and "add_prefix_space is true" in caught.value.what
