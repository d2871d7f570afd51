"""reward: what a rollout, a response or a span was worth, one at a time or a file of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning_proxy.cli.common import (
    ConfigOption,
    JsonOption,
    ProxyOption,
    print_json,
    proxy_client,
    settings_from,
)
from lightning_proxy.errors import InvalidInput, LightningError

if TYPE_CHECKING:
    from lightning_proxy.client import ProxyClient

_AT_A_TIME = 10_000  # lines of a file in one request, each taken whole or not at all


class Kind(StrEnum):
    """What a reward's target is an id of."""

    ROLLOUT = "rollout"
    RESPONSE = "response"
    SPAN = "span"


class Thumb(StrEnum):
    """A user's verdict."""

    UP = "up"
    DOWN = "down"


def reward(
    target: Annotated[str | None, typer.Argument(help="Id of a rollout, or of what --kind says.")] = None,
    value: Annotated[float | None, typer.Argument(help="Any finite number.")] = None,
    kind: Annotated[Kind, typer.Option("--kind", help="What the id is of.")] = Kind.ROLLOUT,
    thumb: Annotated[
        Thumb | None, typer.Option("--thumb", help="In place of a value: 1 or -1, named thumb.")
    ] = None,
    demonstration: Annotated[
        str | None,
        typer.Option("--demonstration", help="What would have been right; kept for later training."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="A later value of this name replaces it. Default: reward.")
    ] = None,
    source: Annotated[str | None, typer.Option("--source", help="Who gave it.")] = None,
    comment: Annotated[str | None, typer.Option("--comment", help="Why.")] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="Only for this attempt.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option("--idempotency-key", help="The same key again changes nothing.")
    ] = None,
    file: Annotated[
        typer.FileText | None,
        typer.Option(
            "--file", help="Post each line of this file, a JSON object as POST /reward takes; - is stdin."
        ),
    ] = None,
    proxy: ProxyOption = None,
    json_: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Give a rollout, a response or a span a reward, through the proxy; or post a file of rewards."""
    fields = {
        "value": value, "thumb": thumb and thumb.value, "demonstration": demonstration, "name": name,
        "source": source, "comment": comment, "attempt": attempt, "idempotency_key": idempotency_key,
    }  # fmt: skip
    body = {key: given for key, given in fields.items() if given is not None}
    if file is not None:
        if target is not None or body:
            raise InvalidInput(
                "--file stands alone: each of its lines says what it is for and what it is worth"
            )
        client = proxy_client(settings_from(config, train__proxy_url=proxy))
        _post_lines(client, file, as_json=json_)
        return
    if target is None:
        raise InvalidInput("whose reward is it? Give the id of a rollout, or a --file of rewards")
    if value is not None and not math.isfinite(value):
        raise InvalidInput(f"a reward is a finite number, and this is {value}")
    if kind is Kind.SPAN and not target.isdecimal():
        raise InvalidInput(f"a span's id is a whole number, and this is {target!r}")
    body[f"{kind.value}_id"] = int(target) if kind is Kind.SPAN else target
    client = proxy_client(settings_from(config, train__proxy_url=proxy))
    answer = client.request("POST", "/reward", body)
    if json_:
        print_json(answer)
    else:
        what = "entry" if value is None and thumb is None else f"reward {thumb or format(value, 'g')}"
        known = "recorded" if answer["created"] else "was recorded before"
        typer.echo(f"{what} for rollout {answer['rollout_id']} {known}")


def _post_lines(client: ProxyClient, file: typer.FileText, *, as_json: bool) -> None:
    entries = _entries(file)
    taken = created = 0
    while lot := list(islice(entries, _AT_A_TIME)):
        try:
            answer = client.request("POST", "/reward", [entry for _, entry in lot])
        except LightningError as error:
            first, last = lot[0][0], lot[-1][0]
            raise type(error)(
                f"lines {first} to {last} were not taken, {taken} rewards before them were: {error}"
            ) from None
        taken += len(lot)
        created += sum(one["created"] for one in answer["rewards"])
    if as_json:
        print_json({"taken": taken, "created": created})
    else:
        typer.echo(f"{taken} rewards taken, {taken - created} of them were recorded before")


def _entries(file: typer.FileText) -> Iterator[tuple[int, Any]]:
    """Line number and entry of each line that is not empty."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise InvalidInput(f"line {number} is no JSON: {error}") from None
