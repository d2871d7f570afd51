"""``rollouts --failed``: what failed, how often, since when."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import TYPE_CHECKING

import typer

from lightning_proxy.cli.common import print_json, print_table, short, when

if TYPE_CHECKING:
    from lightning_proxy.store import By, FailureExample, FailureSummary, Finding, Span, Store


class Part(StrEnum):
    """What failures can be told apart by."""

    ROLE = "role"
    MODEL = "model"
    VERSION = "version"


_PARTS: dict[Part, By] = {Part.ROLE: "role", Part.MODEL: "model", Part.VERSION: "policy_version"}


def show_failures(store: Store, *, since: str | None, by: Part | None, as_json: bool) -> None:
    """Print each class of failure; InvalidInput where ``since`` is no length of time."""
    from lightning_proxy.store import seconds_of

    begin = 0.0 if since is None else time.time() - seconds_of(since)
    found = store.failures(since=begin, by=None if by is None else _PARTS[by])
    if as_json:
        print_json({"since": begin or None, "by": by, "failures": found})
        return
    if not found:
        typer.echo("nothing failed" + (f" in the last {since}" if since else ""))
        return
    head = ("CLASS", "CALLS", "SHARE", "ROLLOUTS", "FAILED", "SINCE", "LAST")
    rows = [
        (f.error_class, f.calls, f"{f.share:.1%}", f.rollouts, f.failed_rollouts, when(f.first.at),
         when(f.last.at))
        for f in found
    ]  # fmt: skip
    if by is not None:
        head = (by.value.upper(), *head)  # type: ignore[assignment]
        rows = [(summary.part, *row) for summary, row in zip(found, rows, strict=True)]  # type: ignore[misc]
    print_table(head, rows)
    for summary in found:
        _show_examples(summary)


def _show_examples(summary: FailureSummary) -> None:
    part = f" of {summary.part}" if summary.part is not None else ""
    typer.echo(f"\n{summary.error_class}{part}")
    typer.echo(f"  first: {_in_words(summary.first)}")
    if summary.last != summary.first:
        typer.echo(f"  last:  {_in_words(summary.last)}")


def _in_words(example: FailureExample) -> str:
    where = f"rollout {example.rollout_id}" + (f", span {example.span_id}" if example.span_id else "")
    return f"{where}: {short(example.message or '-', 160)}"


def findings_of(span: Span) -> str | None:
    """What was found in a call, for a table."""
    return ", ".join(dict.fromkeys(found.error_class.value for found in span.findings)) or None


def in_words(found: Finding) -> str:
    """One finding, for a line of its own."""
    about = f" (tool call {found.call_id})" if found.call_id else ""
    return f"[found: {found.error_class.value}] {found.detail}{about}"
