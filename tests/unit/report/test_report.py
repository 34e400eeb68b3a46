"""The report's files, from a report with everything in it, from the barest one, and from hostile text."""

from __future__ import annotations

import copy
import html.parser
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from lora2edge.errors import OutputError
from lora2edge.report import words, write_report
from lora2edge.report.findings import find, headline
from lora2edge.report.render import render_html, render_markdown
from lora2edge.report.schema import check_report
from lora2edge.report.terminal import print_plan, print_quality, print_speed, print_summary
from lora2edge.report.write import finite
from tests.unit.report.sample import sample_report

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects text, table rows and what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.loads: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "action"}]
        self.loads += [f"on… {name}" for name, _ in attrs if name.startswith("on")]
        if tag in {"script", "iframe", "object", "embed", "link"}:
            self.loads.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if self.rows and self.rows[-1] and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += f" {data}"


def parse(page: str) -> Page:
    parsed = Page()
    parsed.feed(page)
    parsed.close()
    assert parsed.open == []
    return parsed


def bare_report() -> dict[str, Any]:
    """All targets failed before anything was measured."""
    report = sample_report()
    report.update(merge=None, baseline=None, stages=[])
    report["inputs"].update(adapters=[], data=None)
    report["targets"] = {"edge-box": report["targets"]["edge-box"]}
    return report


def test_the_sample_is_of_the_schema() -> None:
    check_report(sample_report())
    check_report(bare_report())


@pytest.mark.parametrize("path", ["verdict", "targets", "machine"])
def test_the_schema_refuses_what_is_missing(path: str) -> None:
    report = sample_report()
    del report[path]
    with pytest.raises(ValidationError):
        check_report(report)


def test_the_schema_refuses_unknown_keys_and_other_versions() -> None:
    with pytest.raises(ValidationError):
        check_report({**sample_report(), "surprise": 1})
    with pytest.raises(ValidationError):
        check_report({**sample_report(), "schema": 2})


def test_three_files_that_say_the_same(tmp_path: Path) -> None:
    report = sample_report()
    write_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = parse((tmp_path / "report.html").read_text())
    markdown = (tmp_path / "report.md").read_text()
    for figure in ("97.1\u00a0%", "2.31\u00a0×", "0.0231", "58.3\u00a0%", "398 MB", "药物相互作用", "[95.8, 98.4]"):
        assert figure in "".join(page.text)
        assert figure in markdown.replace("\\", "")


def test_each_figure_stands_in_its_target_row_and_column() -> None:
    rows = [[cell.strip() for cell in row] for row in parse(render_html(sample_report())).rows]
    header = next(row for row in rows if row[:2] == ["Target", "Verdict"])
    row = next(row for row in rows if row[0] == "gguf/q4_k_m" and len(row) == len(header))
    found = dict(zip(header, row, strict=True))
    assert found["Verdict"] == "✓ pass" and found["Gain kept"].split()[0] == ["97.1", "%"][0]
    assert found["KL"].split()[0] == "0.0231" and found["Flips"].startswith("3.4")
    assert found["Decode"].startswith("2.31") and found["First token"].startswith("1.39")
    assert found["Requests/s"].startswith("2.2\u00a0/\u00a01.8\u00a0/\u00a00.92")


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = render_html(sample_report())
    assert parse(page).loads == []
    assert "url(" not in page and "@import" not in page
    assert re.findall(r"https?://[^\"' <]+", page) == ["http://www.w3.org/2000/svg"] * page.count("<svg ")


def test_the_page_is_the_same_each_time() -> None:
    assert render_html(sample_report()) == render_html(sample_report())
    assert render_markdown(sample_report()) == render_markdown(sample_report())


def test_every_chart_is_well_formed_and_inside_its_frame() -> None:
    charts = re.findall(r"<svg .*?</svg>", render_html(sample_report()), re.S)
    assert len(charts) == 4 + 4 + 6
    for chart in charts:
        root = ET.fromstring(chart)
        _, _, width, height = (float(part) for part in root.attrib["viewBox"].split())
        for shape in root:
            for name in ("x", "x1", "x2", "cx"):
                assert -1 <= float(shape.attrib.get(name, 0)) <= width + 1, ET.tostring(shape)
            for name in ("y", "y1", "y2", "cy"):
                assert -1 <= float(shape.attrib.get(name, 0)) <= height + 1, ET.tostring(shape)
        assert "nan" not in chart and "inf" not in chart


def test_long_labels_of_an_axis_are_not_cut() -> None:
    report = sample_report()
    for target in report["targets"].values():
        if target.get("quality"):
            target["quality"]["gain_kept"] = {"value": 0.99998, "low": 0.99993, "high": 1.00006}
    charts = re.findall(r"<svg .*?</svg>", render_html(report), re.S)
    labels = re.findall(r'<text x="([\d.]+)" y="[^"]*" text-anchor="end" class="tick">([^<]*%)</text>', "".join(charts))
    assert any(len(text) > 8 for _, text in labels)
    assert all(float(x) >= 7 * len(text) for x, text in labels), "a digit is nearly as wide as 7 units"


def test_the_worse_target_is_drawn_worse() -> None:
    chart = next(
        chart for chart in re.findall(r"<svg .*?</svg>", render_html(sample_report()), re.S) if "KL against" in chart
    )
    heights = {
        (shape.find("{*}title").text or "").partition(":")[0]: _height(shape)  # type: ignore[union-attr]
        for shape in ET.fromstring(chart)
        if shape.find("{*}title") is not None
    }
    assert heights["gguf/q2_k"] < heights["gguf/q4_k_m"] < heights["gguf/q8_0"] < heights["merged, unquantized"]


def test_the_barest_report_is_drawn_too(tmp_path: Path) -> None:
    write_report(bare_report(), tmp_path)
    text = "".join(parse((tmp_path / "report.html").read_text()).text)
    assert "no merge proof" in text and "baseline was not measured" in text and "not built" in text


def test_what_was_not_measured_says_so_and_why() -> None:
    report = sample_report()
    target = report["targets"]["gguf/q4_k_m"]
    target["quality"].update(accuracy=None, gain_kept=None, gain_kept_reason="the adapter's gain is not positive")
    report["baseline"].update(accuracy=None, accuracy_reason="no item has a short reference answer")
    for text in ("".join(parse(render_html(report)).text), render_markdown(report)):
        assert "not measured" in text
        assert "no item has a short reference answer" in text
        assert "gain is not positive" in text
        assert "--skip bench was given" in text


def test_figures_that_json_cannot_hold_are_named(tmp_path: Path) -> None:
    report = sample_report()
    report["targets"]["gguf/q2_k"]["quality"].update(ppl=math.inf, kl_p99=math.nan)
    write_report(report, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert written["targets"]["gguf/q2_k"]["quality"]["ppl"] is None
    assert written["not_finite"] == [
        "targets.gguf/q2_k.quality.ppl (inf)",
        "targets.gguf/q2_k.quality.kl_p99 (nan)",
    ]
    assert "quality.ppl (inf)" in (tmp_path / "report.html").read_text()
    assert report["targets"]["gguf/q2_k"]["quality"]["ppl"] == math.inf
    assert finite(sample_report())[1] == []


def test_hostile_text_stays_text() -> None:
    report = sample_report()
    evil = "<script>alert(1)</script>|\n# boo [x](http://a) `"
    report["targets"][evil] = report["targets"].pop("gguf/q4_k_m")
    report["inputs"]["adapters"][0]["name"] = evil
    report["baseline"]["accuracy_by"]["lang"][evil] = 0.9
    page = parse(render_html(report))
    assert page.loads == []
    markdown = render_markdown(report)
    assert "\n# boo" not in markdown and "<script" not in markdown.replace("\\<", "")
    widths = {}
    for line in markdown.splitlines():
        if line.startswith("|"):
            widths[line] = len(re.findall(r"(?<!\\)\|", line))
    for line, after in zip(list(widths), list(widths)[1:], strict=False):
        if after.startswith("| ---"):
            assert widths[line] == widths[after]


def test_invisible_characters_are_shown_by_their_code_point() -> None:
    text = "".join(parse(render_html(sample_report())).text)
    assert "a‹U+0000›b‹U+202E›c" in text and "\u202e" not in text and "\0" not in text


def test_findings_put_the_gravest_first() -> None:
    found = find(sample_report())
    assert [item.tone for item in found] == sorted((item.tone for item in found), key=["fail", "warn", "note"].index)
    said = {(item.tone, item.subject): item.text for item in found}
    assert "≥ 95\u00a0%" in next(item.text for item in found if item.subject == "gguf/q2_k")
    assert "1.2 GB" in said["fail", "edge-box"]
    assert any("0.924" in item.text and "4 concurrent" in item.text for item in found if item.subject == "gguf/q4_k_m")


def test_a_slow_target_within_its_interval_of_the_baseline_is_not_called_slower() -> None:
    report = sample_report()
    report["targets"]["gguf/q4_k_m"]["speed"]["qps_ratio"]["4"] = {"value": 0.97, "low": 0.9, "high": 1.04}
    assert not any("Slower" in item.text for item in find(report) if item.subject == "gguf/q4_k_m")


def test_a_merge_that_failed_comes_before_all_else() -> None:
    report = sample_report()
    report["merge"]["verdict"] = "fail"
    assert "merged model" in headline(report)
    assert find(report)[0].subject == "merge"


@pytest.mark.parametrize(
    ("verdicts", "overall", "words"),
    [
        (["pass", "pass"], "pass", "met every gate"),
        (["pass", "inconclusive"], "inconclusive", "straddles"),
        (["fail", "inconclusive"], "fail", "1 of 2 targets failed"),
    ],
)
def test_the_headline_says_the_verdict(verdicts: list[str], overall: str, words: str) -> None:
    report = sample_report()
    target = report["targets"]["gguf/q4_k_m"]
    report["targets"] = {f"t{number}": {**copy.deepcopy(target), "verdict": v} for number, v in enumerate(verdicts)}
    report["verdict"] = overall
    assert words in headline(report)


def test_without_a_gain_nothing_is_a_share_of_it() -> None:
    report = sample_report()
    report["baseline"]["gain"] = {"value": -0.1, "low": -0.2, "high": 0.05}
    for target in report["targets"].values():
        if "quality" in target:
            target["quality"].update(gain_kept=None, gain_kept_reason="the gain's interval reaches 0")
    rows = {row[0].strip(): row for row in parse(render_html(report)).rows if len(row) == 11}
    assert rows["baseline"][3].strip() == rows["base alone"][3].strip() == "–"
    said = [item.text for item in find(report) if item.subject == "adapter"]
    assert len(said) == 1 and "did not clearly lower" in said[0]


def test_a_target_without_gates_is_pointed_out() -> None:
    report = sample_report()
    report["targets"] = {"free": {**report["targets"]["gguf/q4_k_m"], "gates": []}}
    report["verdict"] = "pass"
    assert "No gate was set" in headline(report)
    assert any("could not fail" in item.text for item in find(report))


def test_many_targets_and_a_single_layer_are_drawn() -> None:
    report = sample_report()
    target = report["targets"]["gguf/q4_k_m"]
    report["targets"] = {f"gguf/variant_number_{number}": copy.deepcopy(target) for number in range(12)}
    for name in report["targets"]:
        report["targets"][name]["damage"] = target["damage"][:1]
    parse(render_html(report))


def test_a_disk_error_names_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "report.json").mkdir()  # a folder stands where the file should go
    with pytest.raises(OutputError) as caught:
        write_report(sample_report(), folder)
    assert caught.value.code == "bad-out" and "report.json" in caught.value.what


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_terminal_summary(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_summary(sample_report(), console)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= width
    flat = re.sub(r"\s+", " ", text)
    assert "2 of 4 targets failed" in flat and "✕ fail" in flat and "97.1" in flat
    assert width < 80 or "[95.8, 98.4]" in flat


def test_verbs_on_the_terminal() -> None:
    report = sample_report()
    target = report["targets"]["gguf/q4_k_m"]
    console = Console(width=120, file=io.StringIO(), record=True)
    speed = {**target["speed"], "notes": ["the machine was busy [bold]before"]}
    print_speed({"target": "gguf/q4_k_m", "scenarios": {"chat": speed}, "reused": False}, console)
    print_quality({"target": "gguf/q4_k_m", "baseline": report["baseline"], **target, "reused": True,
                   "measured_at": "2026-11-20"}, console)  # fmt: skip
    print_plan(
        {
            "inputs": {**report["inputs"], "data": None},
            "adapters": [{"name": "clinic", "kind": "LoRA", "rank": 8, "tensors": 96}],
            "merge_base": {
                "method": "measure",
                "candidates": ["dequantized", "original"],
                "trained_on": {"settings": {"quant_type": "nf4", "double_quant": True}, "folder": None},
            },
            "machine": {"cores": 2, "ram_bytes": 8_000_000_000, "disk_bytes": 10**10, "cuda": None},
            "threads": 2,
            "device": "cpu",
            "stages": [
                {
                    "stage": "prove",
                    "target": None,
                    "ram_bytes": 10**10,
                    "disk_bytes": 0,
                    "seconds": 90.0,
                    "note": "",
                    "fits": False,
                },
                {
                    "stage": "lower",
                    "target": "gguf/q4_k_m",
                    "ram_bytes": 10**9,
                    "disk_bytes": 10**9,
                    "seconds": 60.0,
                    "note": "imatrix",
                    "fits": True,
                },
            ],
            "refused": {"build": [{"what": "too [large]", "code": "memory"}], "targets": {}},
        },
        console,
    )
    text = console.export_text()
    assert "[bold]before" in text and "2.31" in text and "Gain kept: 97.1" in text and "used again" in text
    assert "imatrix" in text and "1 min 30 s" in text and "more than is free" in text
    assert "Trained on a base in NF4 with double quantization: both are measured" in text
    assert "clinic: LoRA of rank 8, 96 tensors" in text and "too [large] (memory)" in text


def _height(shape: ET.Element) -> float:
    if "cy" in shape.attrib:
        return float(shape.attrib["cy"])
    corners = [point.split(",") for point in shape.attrib["points"].split()]
    return sum(float(y) for _, y in corners) / len(corners)


def test_the_merged_checkpoint_s_kl_is_against_the_baseline() -> None:
    """The proof's live model is another one where there is no live form, in a sequence, and on the original base."""
    merge = {"rounding_kl": 3e-5}
    measured = {"candidates": {"original": {"kl_mean": {"value": 0.01}}}}
    assert words.merged_kl({"merge": merge}) == 3e-5
    assert words.merged_kl({"merge": None}) is None
    assert words.merged_kl({"merge": {**merge, "reference": "no live reference"}}) is None
    assert words.merged_kl({"merge": {**merge, "steps": [{"rounding_kl": 3e-5}, {"rounding_kl": 1e-5}]}}) == 1e-5
    for found, expected in ((measured, 0.01), (None, None)):
        assert words.merged_kl({"merge": merge, "merge_base": {"chosen": "original", "measured": found}}) == expected
    chosen = {"chosen": "dequantized", "measured": measured}
    assert words.merged_kl({"merge": merge, "merge_base": chosen}) == 3e-5
