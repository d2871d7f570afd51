"""export, import: what was recorded, out into other tools' formats, and what others recorded, in."""

from __future__ import annotations

import time
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning_proxy.cli.common import (
    ConfigOption,
    DbOption,
    JsonOption,
    open_store,
    print_json,
    settings_from,
)
from lightning_proxy.errors import InvalidInput
from lightning_proxy.words import ExportFormat, Fidelity, Per, RolloutState

if TYPE_CHECKING:
    from lightning_proxy.exchange.otel_import import ImportReport


class ImportFormat(StrEnum):
    """What is read."""

    OTEL = "otel"


# The options of `export`, which are many.
FormatOption = Annotated[ExportFormat, typer.Option("--format", help="What is written.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="File to write; a directory for llama-factory.")
]
PerOption = Annotated[Per, typer.Option("--per", help="What a row is of: jsonl, parquet.")]
TokensOption = Annotated[
    bool, typer.Option("--tokens/--no-tokens", help="With token ids and logprobs: jsonl, parquet.")
]
RawOption = Annotated[
    bool, typer.Option("--raw", help="With the bodies of requests and responses: jsonl, parquet.")
]
EndpointOption = Annotated[
    str | None, typer.Option("--endpoint", help="OTLP/HTTP receiver, e.g. http://127.0.0.1:4318.")
]
HeaderOption = Annotated[
    list[str] | None, typer.Option("--header", help="Sent to it, e.g. x-api-key=SECRET.", metavar="K=V")
]
ContentOption = Annotated[bool, typer.Option("--content/--no-content", help="With what was said: otlp.")]
MinGapOption = Annotated[
    float,
    typer.Option("--min-gap", min=0.0, help="Least difference in reward of a preference: llama-factory."),
]
SinceOption = Annotated[
    str | None, typer.Option("--since", help="Rollouts begun since: 2026-01-31, an ISO time, or 12h, 7d ago.")
]
UntilOption = Annotated[str | None, typer.Option("--until", help="Rollouts begun before that.")]
RolloutsOption = Annotated[list[str] | None, typer.Option("--rollout", help="Only these.")]
TasksOption = Annotated[list[str] | None, typer.Option("--task-id", help="Only of these tasks.")]
StatesOption = Annotated[list[RolloutState] | None, typer.Option("--state", help="Only in these states.")]
MinRewardOption = Annotated[
    float | None, typer.Option("--min-reward", help="Only attempts worth at least that.")
]
RewardedOption = Annotated[bool, typer.Option("--rewarded", help="Only attempts with a reward.")]
LastAttemptOption = Annotated[
    bool, typer.Option("--last-attempt", help="Only the last attempt of each rollout.")
]
RolesOption = Annotated[list[str] | None, typer.Option("--role", help="Only calls of these roles.")]
OnlyPolicyOption = Annotated[str | None, typer.Option("--policy", help="Only calls to this policy.")]
VersionsOption = Annotated[
    list[int] | None, typer.Option("--policy-version", help="Only calls to these versions of it.")
]
FidelitiesOption = Annotated[
    list[Fidelity] | None,
    typer.Option(
        "--fidelity",
        help="Only calls of this fidelity. Neither serve nor import makes retokenized ones.",
    ),
]


def export(
    format_: FormatOption,
    out: OutOption = None,
    per: PerOption = Per.SPAN,
    tokens: TokensOption = True,
    raw: RawOption = False,
    endpoint: EndpointOption = None,
    header: HeaderOption = None,
    content: ContentOption = False,
    min_gap: MinGapOption = 0.0,
    since: SinceOption = None,
    until: UntilOption = None,
    rollout: RolloutsOption = None,
    task_id: TasksOption = None,
    state: StatesOption = None,
    min_reward: MinRewardOption = None,
    rewarded: RewardedOption = False,
    last_attempt: LastAttemptOption = False,
    role: RolesOption = None,
    policy: OnlyPolicyOption = None,
    version: VersionsOption = None,
    fidelity: FidelitiesOption = None,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """Write what was recorded in a format of other tools. Options may be given several times."""
    from lightning_proxy.exchange.formats import Target
    from lightning_proxy.exchange.formats import export as export_as
    from lightning_proxy.exchange.records import Selection

    selection = Selection(
        since=_time(since, "--since"),
        until=_time(until, "--until"),
        rollout_ids=frozenset(rollout or ()),
        task_ids=frozenset(task_id or ()),
        states=frozenset(state or ()),
        min_reward=min_reward,
        rewarded=rewarded,
        roles=frozenset(role or ()),
        policy=policy,
        versions=frozenset(version or ()),
        fidelities=frozenset(fidelity or ()),
        last_attempt_only=last_attempt or format_ in (ExportFormat.LLAMA_FACTORY, ExportFormat.DSPY),
    )
    target = Target(
        out, per, tokens, raw, min_gap, endpoint, dict(_header(one) for one in header or ()), content
    )
    with open_store(settings_from(config, store__db=db)) as store:
        done = export_as(format_, store, selection, target)
    if json_:
        print_json({"format": format_.value, **done.numbers})
    else:
        typer.echo(f"exported {done.message}")


def import_(
    files: Annotated[
        list[Path], typer.Argument(help="Files with traces in OTLP.", exists=True, dir_okay=False)
    ],
    format_: Annotated[ImportFormat, typer.Option("--format", help="What is read.")] = ImportFormat.OTEL,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """Take in model calls that others have traced. Again is no harm: known ones are passed over."""
    from lightning_proxy.exchange.otel_import import import_files
    from lightning_proxy.redaction import Redactor
    from lightning_proxy.store import Store

    settings = settings_from(config, store__db=db)
    redactor = Redactor.of(settings.redaction)
    with Store.open(settings.store.db, busy_timeout_s=settings.store.busy_timeout_s) as store:
        report = import_files(store, files, redactor=redactor)
    if json_:
        print_json({**_numbers(report), "other_steps": dict(report.other_steps)})
        return
    said = [
        f"imported {report.calls} calls of {len(report.rollouts)} rollouts and {report.rewards} rewards "
        f"into {settings.store.db}"
    ]
    notes = {
        "were known already": report.known,
        "have no messages, for the tracer kept none": report.without_content,
        "are a framework's spans around calls that were taken": report.wrappers,
    }
    said += [f"  {number} {what}" for what, number in notes.items() if number]
    steps = ", ".join(f"{count} {kind}" for kind, count in report.other_steps.most_common())
    if steps or report.unknown:
        said.append(f"  passed over, for they are no model calls: {steps or 'no steps of agents'}, and "
                    f"{report.unknown} spans of other things")  # fmt: skip
    typer.echo("\n".join(said))


def _numbers(report: ImportReport) -> dict[str, int]:
    return {
        "calls": report.calls,
        "rollouts": len(report.rollouts),
        "rewards": report.rewards,
        "known": report.known,
        "without_content": report.without_content,
        "wrappers": report.wrappers,
        "unknown": report.unknown,
    }


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InvalidInput(f"--header is {text!r}: a name and a value are needed, e.g. x-api-key=SECRET")
    return name.strip(), value


def _time(text: str | None, option: str) -> float | None:
    """Unix seconds of a date, a time (this machine's, unless it says which), or so long ago."""
    if text is None:
        return None
    from lightning_proxy.store import seconds_of

    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        pass  # it may say how long ago
    try:
        return time.time() - seconds_of(text)
    except InvalidInput:
        raise InvalidInput(
            f"{option} is {text!r}: a date (2026-01-31), a time (2026-01-31T12:00) or a time ago (12h, 7d) "
            "is needed"
        ) from None
