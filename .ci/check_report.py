"""Asserts on the demo's report: the figures that the README promises."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
merge, baseline, targets = report["merge"], report["baseline"], report["targets"]


def check(name: str, value: float, low: float = float("-inf"), high: float = float("inf")) -> None:
    """Prints the figure, and ends the run where it is out of bounds."""
    holds = low <= value <= high
    print(f"{'ok  ' if holds else 'FAIL'} {name} = {value:.6g}  [{low:g}, {high:g}]")
    if not holds:
        sys.exit(1)


check("merge.math_kl", merge["math_kl"], high=1e-9)
check("merge.rounding_kl", merge["rounding_kl"], high=1e-5)
check("merge.kl_mean", merge["kl_mean"], high=2 * merge["floor_kl"])
check("base accuracy", baseline["base"]["accuracy"], high=0.30)
check("baseline accuracy", baseline["accuracy"], low=0.85)
check("merged accuracy", targets["hf/merged"]["quality"]["accuracy"], low=0.85)
for name, gain_kept in (("gguf/q8_0", 0.995), ("gguf/q4_k_m", 0.97)):
    target = targets[name]
    check(f"{name} gain kept", target["quality"]["gain_kept"]["value"], low=gain_kept)
    check(f"{name} accuracy", target["quality"]["accuracy"], low=0.80)
    check(f"{name} decode ratio", target["speed"]["decode_ratio"]["value"], low=1.0)
    check(f"{name} verdict is pass", float(target["verdict"] == "pass"), low=1)
reused = sum(stage["reused"] for stage in report["stages"])
check("stages reused in the second run", reused, low=len(report["stages"]))
