"""Runs in the interpreter that has optimum-onnx, and imports nothing of lora2edge.

`probe KIND TASK`: whether it exports models of config.json's `model_type` KIND; `export FOLDER OUT TASK`: does it, in
float32. The last line of standard output is JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys

_NAMED = ("optimum-onnx", "optimum", "transformers", "torch")


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _NAMED}


def _probe(kind: str, task: str) -> dict[str, object]:
    import optimum.exporters.onnx.model_configs  # noqa: F401  (registers what it knows)
    from optimum.exporters.tasks import TasksManager

    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(kind, exporter="onnx", library_name="transformers")
    except KeyError:
        tasks = {}
    return {"knows": task in tasks, "versions": _versions()}


def _export(folder: str, out: str, task: str) -> dict[str, object]:
    from optimum.exporters.onnx import main_export

    main_export(folder, output=out, task=task, device="cpu", dtype="fp32", do_validation=False, local_files_only=True)
    return {"versions": _versions()}


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    verb, *words = sys.argv[1:]
    answer = _probe(*words) if verb == "probe" else _export(*words)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
