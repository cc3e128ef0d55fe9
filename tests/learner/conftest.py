"""Ends a run with one line on the reference cases: how many matched, differ on purpose, or are not covered yet."""

from __future__ import annotations

from collections import Counter

from _pytest.terminal import TerminalReporter

OUTCOMES = ("matched", "deliberately different", "not covered")


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    counts = Counter(value for report in reports for name, value in report.user_properties if name == "reference_case")
    if counts:
        shown = [f"{counts.pop(outcome, 0)} {outcome}" for outcome in OUTCOMES]
        shown += [f"{count} {outcome}" for outcome, count in counts.items()]
        terminalreporter.write_line(f"reference cases: {', '.join(shown)}")
