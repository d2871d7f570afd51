"""init, serve, demo: from nothing to something that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightning_proxy.cli.common import ConfigOption, DbOption, JsonOption, print_json
from lightning_proxy.errors import ConfigError


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("lightning.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a lightning.toml with every setting, its meaning and its default."""
    from lightning_proxy.config.template import render_toml

    if path.exists() and not force:
        raise ConfigError(f"{path} is there already: name another file, or give --force to replace it")
    try:
        path.write_text(render_toml(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    typer.echo(f"{path} written. Next: lightning-proxy serve --upstream URL, or --model DIRECTORY")


def serve(
    upstream: Annotated[
        str | None,
        typer.Option("--upstream", metavar="URL", help="Engine that runs already, as for OPENAI_BASE_URL."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="Weights to serve: vLLM is started and supervised."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The policy's name, which agents ask for.")
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on. Default: 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on. Default: 8080.")] = None,
    token: Annotated[
        str | None,
        typer.Option("--token", help="Secret for agents and control (rather: LIGHTNING_PROXY__TOKEN)."),
    ] = None,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """Put the proxy in front of a model and record every call.

    With --upstream the engine is yours; with --model vLLM is started and supervised. With both, the
    engine is yours and --model says which weights it was started with, for training.
    """
    from lightning_proxy.config import load_settings

    flags: dict[str, object] = {
        "proxy.upstream": upstream, "policy.model": model, "policy.name": name, "proxy.host": host,
        "proxy.port": port, "proxy.token": token, "store.db": db,
    }  # fmt: skip
    given = {key: value for key, value in flags.items() if value is not None}
    if model is not None:
        given["proxy.upstream"] = upstream  # --model alone starts vLLM, whatever the file says
    settings = load_settings(config=config, overrides=given)
    if settings.proxy.upstream is None and settings.policy.model is None:
        raise ConfigError(
            "nothing to serve: give --upstream URL for an engine that runs, or --model DIR to start vLLM"
        )

    from lightning_proxy.proxy.app import serve as run_proxy

    run_proxy(settings, typer.echo)


def demo(
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which tasks, and all else that is random.")] = 0,
    iterations: Annotated[
        int | None, typer.Option("--iterations", min=1, help="Most turns of the loop. Default: 24.")
    ] = None,
    workdir: Annotated[
        Path, typer.Option("--workdir", metavar="DIR", help="Database, logs, weights and curve go there.")
    ] = Path("lightning-demo"),
    json_: JsonOption = False,
) -> None:
    """Close the whole loop on this machine: an agent that learns.

    A tiny model behind a real vLLM, an ordinary tool-using agent, rewards after the fact, training,
    new weights behind the running proxy, again and again, for two to four minutes. Exit code 1 if
    held-out success does not get over 0.8.
    """
    from lightning_proxy.demo.text_to_sql import TEXT_TO_SQL
    from lightning_proxy.experiment.loop import run

    result = run(
        TEXT_TO_SQL,
        workdir=workdir,
        seed=seed,
        iterations=iterations,
        say=lambda line: typer.echo(line, err=json_),
    )
    if json_:
        print_json(result.summary())
    else:
        typer.echo(
            f"held-out success: {result.initial:.3f} before, {result.final:.3f} after "
            f"{len(result.iterations)} iterations, {result.seconds:.0f} s; the curve is in {workdir}"
        )
    raise typer.Exit(0 if result.reached else 1)
