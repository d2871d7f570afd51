"""rollouts, spans, reward: what was recorded, and what it was worth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lightning_proxy.cli.common import (
    ConfigOption,
    DbOption,
    JsonOption,
    LimitOption,
    ProxyOption,
    open_store,
    print_json,
    print_table,
    proxy_client,
    settings_from,
    when,
)
from lightning_proxy.errors import InvalidInput

if TYPE_CHECKING:
    from lightning_proxy.store import Reward, Span, Store


class State(StrEnum):
    """The states by which rollouts can be chosen."""

    OPEN = "open"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Kind(StrEnum):
    """What a reward's target is an id of."""

    ROLLOUT = "rollout"
    RESPONSE = "response"
    SPAN = "span"


# --- rollouts -----------------------------------------------------------------------------------


def rollouts(
    rollout_id: Annotated[
        str | None, typer.Argument(help="Show this one, with its spans and rewards.")
    ] = None,
    state: Annotated[State | None, typer.Option("--state", help="Only those in this state.")] = None,
    task_id: Annotated[str | None, typer.Option("--task-id", help="Only those of this task.")] = None,
    limit: LimitOption = 20,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """List rollouts, newest first, or show one."""
    from lightning_proxy.store import RolloutState

    with open_store(settings_from(config, store__db=db)) as store:
        if rollout_id is not None:
            _show_rollout(store, rollout_id, json_)
            return
        found = store.list_rollouts(
            state=RolloutState(state) if state else None, task_id=task_id, limit=limit
        )
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
    spans = store.list_spans(rollout_id=rollout_id, limit=10_000)[::-1]
    rewards = store.list_rewards(rollout_id)
    if as_json:
        print_json({"rollout": rollout, "spans": [_head(span) for span in spans], "rewards": rewards})
        return
    because = f" ({rollout.reason})" if rollout.reason else ""
    typer.echo(f"rollout {rollout.rollout_id}, task {rollout.task_id or '-'}: {rollout.state.value}{because}")
    if rollout.incomplete:
        typer.echo(f"incomplete: {rollout.incomplete}")
    typer.echo(f"\n{len(spans)} calls")
    _print_heads(spans)
    counting = {reward.reward_id for reward in store.counting_rewards(rollout_id)}
    typer.echo(f"\n{len(rewards)} rewards")
    print_table(
        ("VALUE", "NAME", "FOR", "SOURCE", "COUNTS", "AT", "COMMENT"),
        [
            (r.value, r.name, _rewarded(r), r.source, "yes" if r.reward_id in counting else "no",
             when(r.created_at), r.comment)
            for r in rewards
        ],
    )  # fmt: skip


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
        found = store.list_spans(rollout_id=rollout, limit=limit)
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
    if span.generations and not span.redacted:
        prompt = len(span.generations[0].prompt_token_ids)
        return prompt, sum(len(generation.response_token_ids) for generation in span.generations)
    usage = span.usage or {}
    return usage.get("prompt_tokens"), usage.get("completion_tokens")


def _print_heads(spans: list[Span]) -> None:
    print_table(
        ("SPAN", "ROLLOUT", "ROLE", "MODEL", "VERSION", "STATUS", "TOKENS", "FIDELITY", "SECONDS", "AT"),
        [
            (s.span_id, s.rollout_id, s.role, s.model, s.policy_version, s.error_class or s.status,
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


def _conversation(span: Span) -> Iterator[tuple[str, str]]:
    """Who said what: the request's messages or prompt, then the reply of every choice."""
    request = _parsed(span.request)
    for message in request.get("messages") or ():
        yield str(message.get("role")), _said(message)
    if "prompt" in request:
        yield "prompt", str(request["prompt"])
    for choice in _parsed(span.response).get("choices") or ():
        yield "reply", _said(choice["message"]) if "message" in choice else str(choice.get("text", ""))


def _parsed(body: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(body or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _said(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    parts = (
        [content]
        if isinstance(content, str)
        else [json.dumps(part, ensure_ascii=False) for part in content or ()]
    )
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        parts.append(f"-> {function.get('name')}({function.get('arguments')})")
    return "\n".join(part for part in parts if part)


# --- reward -------------------------------------------------------------------------------------


def reward(
    target: Annotated[str, typer.Argument(help="Id of a rollout, or of what --kind says.")],
    value: Annotated[float, typer.Argument(help="Any finite number.")],
    kind: Annotated[Kind, typer.Option("--kind", help="What the id is of.")] = Kind.ROLLOUT,
    name: Annotated[str, typer.Option("--name", help="A later reward of this name replaces it.")] = "reward",
    source: Annotated[str | None, typer.Option("--source", help="Who gave it.")] = None,
    comment: Annotated[str | None, typer.Option("--comment", help="Why.")] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="Only for this attempt.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option("--idempotency-key", help="The same key again changes nothing.")
    ] = None,
    proxy: ProxyOption = None,
    json_: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Give a rollout, a response or a span a reward, through the proxy."""
    if not math.isfinite(value):
        raise InvalidInput(f"a reward is a finite number, and this is {value}")
    if kind is Kind.SPAN and not target.isdecimal():
        raise InvalidInput(f"a span's id is a whole number, and this is {target!r}")
    body = {
        f"{kind.value}_id": int(target) if kind is Kind.SPAN else target,
        "value": value, "name": name, "source": source, "comment": comment, "attempt": attempt,
        "idempotency_key": idempotency_key,
    }  # fmt: skip
    client = proxy_client(settings_from(config, train__proxy_url=proxy))
    answer = client.request("POST", "/reward", {key: val for key, val in body.items() if val is not None})
    if json_:
        print_json(answer)
    else:
        known = "recorded" if answer["created"] else "was recorded before"
        typer.echo(f"reward {value:g} for rollout {answer['rollout_id']} {known}")
