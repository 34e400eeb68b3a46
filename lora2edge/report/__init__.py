"""What a build found, for people (HTML, Markdown, terminal) and for programs (JSON). Imports no ML library."""

from lora2edge.report.write import write_report

__all__ = ["write_report"]
