"""The report of a run: one self-contained HTML page, and pictures. Takes plain values only."""

from overture.report.page import Answer, PromptSummary, Report, Sample, render, write

__all__ = ["Answer", "PromptSummary", "Report", "Sample", "render", "write"]
