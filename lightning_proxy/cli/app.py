"""The application: its commands, and how errors end."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lightning_proxy import __version__
from lightning_proxy.cli import (
    doctor,
    exchange,
    learn,
    policies,
    prune,
    records,
    rewards,
    roles,
    run,
    setup,
    status,
    tasks,
)
from lightning_proxy.errors import ConfigError, InvalidInput, LightningError

_TRACEBACK = "traceback"


class Commands(TyperGroup):
    """Ends with one line on stderr for every error raised on purpose; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Exit code 2 for what the user typed or configured, 1 for what failed."""
        try:
            return super().invoke(ctx)
        except LightningError as error:
            if ctx.params.get(_TRACEBACK):
                raise
            typer.echo(f"lightning-proxy: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, (ConfigError, InvalidInput)) else 1) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lightning-proxy {__version__}")
        raise typer.Exit


def _options(
    traceback: Annotated[
        bool, typer.Option("--traceback", envvar="LIGHTNING_DEBUG", help="Show where an error came from.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A transparent proxy that turns any running agent into a learning one."""


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # examples keep their lines, and help starts faster
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with: lightning-proxy demo, or lightning-proxy init and lightning-proxy serve.",
)
app.callback()(_options)


def _example(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


# Values and commands that begin with a dash belong to the user, not to us.
_TAKES_NEGATIVE_NUMBERS = {"ignore_unknown_options": True}
_TAKES_A_COMMAND = {"ignore_unknown_options": True, "allow_interspersed_args": False}

app.command(epilog=_example("lightning-proxy init", "lightning-proxy init staging.toml"))(setup.init)
app.command(
    epilog=_example(
        "lightning-proxy serve --upstream http://127.0.0.1:8000/v1",
        "lightning-proxy serve --model ./my-model --name my-model --port 8080",
    )
)(setup.serve)
app.command(
    epilog=_example(
        "lightning-proxy train",
        "lightning-proxy train --dry-run",
        "lightning-proxy train --algorithm sft   (the best rollouts, and demonstrations)",
        "*/15 * * * * cd /srv/agent && lightning-proxy train   (in a crontab)",
    )
)(learn.train)
app.command(
    context_settings=_TAKES_A_COMMAND,
    epilog=_example(
        "lightning-proxy run --task-id task-17 -- python agent.py 'What is 6 times 7?'",
        "lightning-proxy run --tasks tasks.jsonl --group-size 8 --concurrency 4 -- python agent.py",
        "lightning-proxy run --worker --watch --proxy http://gateway:8080 -- python agent.py",
    ),
)(run.run)
app.add_typer(
    tasks.app, epilog=_example("lightning-proxy tasks", "lightning-proxy tasks --state open --json")
)
tasks.app.command(epilog=_example("lightning-proxy tasks add tasks.jsonl --group-size 8"))(tasks.add)
tasks.app.command(epilog=_example("lightning-proxy tasks show task-17"))(tasks.show)
tasks.app.command(epilog=_example("lightning-proxy tasks cancel task-17"))(tasks.cancel)
app.command(
    epilog=_example(
        "lightning-proxy rollouts --state open",
        "lightning-proxy rollouts r-17",
        "lightning-proxy rollouts --failed --since 24h --by role",
        "lightning-proxy rollouts --json",
    )
)(records.rollouts)
app.add_typer(
    records.spans_app,
    epilog=_example(
        "lightning-proxy spans --rollout r-17", "lightning-proxy spans 42", "lightning-proxy spans roles"
    ),
)
records.spans_app.command(
    epilog=_example("lightning-proxy spans roles", "lightning-proxy spans roles --json")
)(roles.roles)
app.command(
    context_settings=_TAKES_NEGATIVE_NUMBERS,
    epilog=_example(
        "lightning-proxy reward r-17 1.0",
        "lightning-proxy reward chatcmpl-abc --kind response -0.5 --name style --source reviewer",
        "lightning-proxy reward chatcmpl-abc --kind response --thumb down --demonstration 'It is 42.'",
        "lightning-proxy reward --file rewards.jsonl",
    ),
)(rewards.reward)
app.add_typer(policies.app, epilog=_example("lightning-proxy policies", "lightning-proxy policies promote 3"))
policies.app.command(
    epilog=_example(
        "lightning-proxy policies compare",
        "lightning-proxy policies compare --against parent --since 30d",
        "lightning-proxy policies compare --reward thumb --json",
    )
)(policies.compare)
policies.app.command(epilog=_example("lightning-proxy policies promote 3"))(policies.promote)
policies.app.command(
    epilog=_example("lightning-proxy policies rollback", "lightning-proxy policies rollback --to 2")
)(policies.rollback)
app.command(
    epilog=_example(
        "lightning-proxy prune --older-than 30d --dry-run",
        "lightning-proxy prune --tag customer=acme --vacuum",
    )
)(prune.prune)
app.command(
    epilog=_example(
        "lightning-proxy export --format parquet --out spans.parquet --since 7d",
        "lightning-proxy export --format llama-factory --out data/ --min-reward 1",
        "lightning-proxy export --format otlp --endpoint http://127.0.0.1:4318 --content",
    )
)(exchange.export)
app.command(
    name="import",
    epilog=_example("lightning-proxy import traces.jsonl", "lightning-proxy import --format otel *.pb"),
)(exchange.import_)
app.command(epilog=_example("lightning-proxy status", "lightning-proxy status --json"))(status.status)
app.command(epilog=_example("lightning-proxy doctor", "lightning-proxy doctor --json"))(doctor.doctor)
app.command(epilog=_example("lightning-proxy demo", "lightning-proxy demo --seed 1 --json"))(setup.demo)
