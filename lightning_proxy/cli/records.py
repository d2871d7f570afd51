"""rollouts, spans: what was recorded."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lightning_proxy.cli.common import (
    ConfigOption,
    DbOption,
    JsonOption,
    LimitOption,
    open_store,
    print_json,
    print_table,
    settings_from,
    short,
    when,
)
from lightning_proxy.cli.failures import Part, findings_of, in_words, show_failures
from lightning_proxy.errors import InvalidInput
from lightning_proxy.words import RolloutState

if TYPE_CHECKING:
    from lightning_proxy.exchange.messages import Message
    from lightning_proxy.store import Reward, Span, Store


# --- rollouts -----------------------------------------------------------------------------------


def rollouts(
    rollout_id: Annotated[
        str | None, typer.Argument(help="Show this one, with its spans and rewards.")
    ] = None,
    state: Annotated[RolloutState | None, typer.Option("--state", help="Only those in this state.")] = None,
    task_id: Annotated[str | None, typer.Option("--task-id", help="Only those of this task.")] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="What failed: how often, since when, with examples.")
    ] = False,
    by: Annotated[Part | None, typer.Option("--by", help="With --failed: tell these apart.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="With --failed: only the last 24h, 30m, 7d.", metavar="TIME")
    ] = None,
    limit: LimitOption = 20,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """List rollouts, newest first, show one, or show what failed."""
    if (by or since) and not failed:
        raise InvalidInput("--by and --since are for --failed: lightning-proxy rollouts --failed --since 24h")
    with open_store(settings_from(config, store__db=db)) as store:
        if failed:
            show_failures(store, since=since, by=by, as_json=json_)
            return
        if rollout_id is not None:
            _show_rollout(store, rollout_id, json_)
            return
        found = store.list_rollouts(state=state, task_id=task_id, limit=limit)
    if json_:
        print_json({"rollouts": found})
        return
    print_table(
        ("ROLLOUT", "TASK", "STATE", "CALLS", "ERRORS", "REWARD", "BEGUN"),
        [
            (s.rollout.rollout_id, s.rollout.task_id, s.rollout.state.value, s.spans, s.errors, s.reward,
             when(s.rollout.created_at))
            for s in found
        ],
    )  # fmt: skip


def _show_rollout(store: Store, rollout_id: str, as_json: bool) -> None:
    rollout = store.get_rollout(rollout_id)
    spans = store.list_spans(rollout_id=rollout_id, limit=10_000, content=False)[::-1]
    rewards = store.list_rewards(rollout_id)
    if as_json:
        print_json({"rollout": rollout, "spans": [_head(span) for span in spans], "rewards": rewards})
        return
    because = f" ({rollout.reason})" if rollout.reason else ""
    by_what = f", {rollout.error_class.value}" if rollout.error_class else ""
    by_what += ", presumed from its silence" if rollout.presumed else ""
    end = f"{rollout.state.value}{by_what}{because}"
    typer.echo(f"rollout {rollout.rollout_id}, task {rollout.task_id or '-'}: {end}")
    if rollout.incomplete:
        typer.echo(f"incomplete: {rollout.incomplete}")
    typer.echo(f"\n{len(spans)} calls")
    _print_heads(spans)
    for span in spans:
        for found in span.findings:
            typer.echo(f"  span {span.span_id} {in_words(found)}")
    counting = {reward.reward_id for reward in store.counting_rewards(rollout_id)}
    typer.echo(f"\n{len(rewards)} rewards")
    print_table(
        ("VALUE", "NAME", "FOR", "SOURCE", "COUNTS", "AT", "COMMENT", "DEMONSTRATION"),
        [
            (r.value, r.name, _rewarded(r), r.source, _counts(r, counting), when(r.created_at), r.comment,
             r.demonstration and short(_shown(r.demonstration)))
            for r in rewards
        ],
    )  # fmt: skip


def _counts(reward: Reward, counting: Container[int | None]) -> str | None:
    """Whether it makes part of the return, or was corrected since; None where it has no value."""
    if reward.value is None:
        return None
    return "yes" if reward.reward_id in counting else "no"


def _shown(demonstration: str | Mapping[str, Any]) -> str:
    from lightning_proxy.exchange.messages import chat_message

    return demonstration if isinstance(demonstration, str) else _said(chat_message(dict(demonstration)))


def _rewarded(reward: Reward) -> str:
    if reward.span_id is not None:
        return f"span {reward.span_id}"
    return "rollout" if reward.attempt is None else f"attempt {reward.attempt}"


# --- spans --------------------------------------------------------------------------------------


class SpansGroup(TyperGroup):
    """``spans 42`` shows a span, ``spans roles`` is a command: what is none is a span's id."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """``show`` is the command behind an id."""
        if args and args[0] not in self.commands:
            args = ["show", *args]
        return super().resolve_command(ctx, args)


spans_app = typer.Typer(
    name="spans",
    cls=SpansGroup,
    invoke_without_command=True,
    rich_markup_mode=None,
    subcommand_metavar="[SPAN_ID | roles]",
)


@spans_app.callback()
def spans(
    ctx: typer.Context,
    rollout: Annotated[str | None, typer.Option("--rollout", help="Only those of this rollout.")] = None,
    limit: LimitOption = 20,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """List recorded calls, newest first; show one by its id; or tell the agents among them apart."""
    if ctx.invoked_subcommand is not None:
        return
    with open_store(settings_from(config, store__db=db)) as store:
        found = store.list_spans(rollout_id=rollout, limit=limit, content=False)
    if json_:
        print_json({"spans": [_head(span) for span in found]})
    else:
        _print_heads(found)


@spans_app.command(hidden=True)
def show(
    ctx: typer.Context,
    span_id: Annotated[int, typer.Argument(help="Show this one: messages, reply, tokens.")],
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """Show one span: messages, reply, tokens."""
    before: dict[str, Any] = ctx.parent.params if ctx.parent is not None else {}  # `spans --json 42`
    with open_store(settings_from(config or before["config"], store__db=db or before["db"])) as store:
        span = store.get_span(span_id)
    if json_ or before["json_"]:
        print_json(span)
    else:
        _show_span(span)


def _head(span: Span) -> dict[str, Any]:
    from lightning_proxy.store.json_view import as_json

    head: dict[str, Any] = as_json(span, leave_out=frozenset({"request", "response", "generations"}))
    head["prompt_tokens"], head["response_tokens"] = _token_counts(span)
    return head


def _token_counts(span: Span) -> tuple[int | None, int | None]:
    """Tokens read and written: captured ones, else what the engine's usage says."""
    if span.prompt_tokens is not None:
        return span.prompt_tokens, span.response_tokens
    usage = span.usage or {}
    return usage.get("prompt_tokens"), usage.get("completion_tokens")


def _print_heads(spans: list[Span]) -> None:
    print_table(
        ("SPAN", "ROLLOUT", "ROLE", "MODEL", "VERSION", "STATUS", "TOKENS", "FIDELITY", "SECONDS", "AT"),
        [
            (s.span_id, s.rollout_id, s.role, s.model, s.policy_version,
             s.error_class or findings_of(s) or s.status,
             "{}+{}".format(*("?" if n is None else n for n in _token_counts(s))), s.fidelity.value,
             f"{s.ended_at - s.started_at:.2f}", when(s.started_at))
            for s in spans
        ],
    )  # fmt: skip


def _show_span(span: Span) -> None:
    prompt, written = _token_counts(span)
    typer.echo(
        f"span {span.span_id} of rollout {span.rollout_id}, attempt {span.attempt}, role {span.role or '-'}"
    )
    typer.echo(f"{span.wire}, model {span.model}, policy {span.policy or '-'} version {span.policy_version}")
    typer.echo(
        f"{when(span.started_at)}, {span.ended_at - span.started_at:.3f} s, status {span.status}, "
        f"attributed by {span.attributed_by} (sure: {span.attribution_confidence:g}), "
        f"{'streamed' if span.streamed else 'not streamed'}"
        + (f", try {span.retry + 1} of its client" if span.retry else "")
    )
    logprobs = sum(len(generation.logprobs) for generation in span.generations)
    typer.echo(
        f"tokens: {prompt} read, {written} written, {logprobs} logprobs; fidelity {span.fidelity.value}"
        + (f"; redacted by {span.redacted}" if span.redacted else "")
    )
    for speaker, text in _conversation(span):
        typer.echo(f"\n[{speaker}] {text}")
    if span.error_class:
        typer.echo(f"\n[error: {span.error_class}] {span.error}")
    for found in span.findings:
        typer.echo(f"\n{in_words(found)}")


def _conversation(span: Span) -> Iterator[tuple[str, str]]:
    """Who said what, in any of the APIs: the request's messages, then the reply of every choice."""
    from lightning_proxy.exchange.messages import exchange_of

    said = exchange_of(span)
    for message in said.messages:
        yield message.role, _said(message)
    for reply in said.replies:
        yield "reply", _said(reply.message)


def _said(message: Message) -> str:
    calls = [f"-> {call.name}({call.arguments})" for call in message.tool_calls]
    return "\n".join(part for part in (message.content, message.parts, *calls) if part)
