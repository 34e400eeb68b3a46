"""What a build found, for people (HTML, Markdown, terminal) and for programs (JSON). Imports no ML library."""

from lora2edge.report.write import REPORTS, write_report

__all__ = ["REPORTS", "write_report"]
