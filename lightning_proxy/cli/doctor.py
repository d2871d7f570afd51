"""doctor: what keeps an installation from learning."""

from __future__ import annotations

from dataclasses import asdict

import typer

from lightning_proxy.cli.common import (
    ConfigOption,
    DbOption,
    JsonOption,
    ProxyOption,
    print_json,
    settings_from,
)


def doctor(
    proxy: ProxyOption = None,
    json_: JsonOption = False,
    db: DbOption = None,
    config: ConfigOption = None,
) -> None:
    """Look at everything that learning needs, and say what to do about what is amiss.

    Nothing is changed, and no call is made to the model. Exit code 1 if there is a problem; notes are none.
    """
    from lightning_proxy.doctor import Finding, Level, examine

    found: list[Finding] = []
    for each in examine(settings_from(config, store__db=db, train__proxy_url=proxy)):
        found.append(each)
        if not json_:
            typer.echo(f"{each.level.value:<8} {each.about}: {each.text}")
            if each.to_do:
                typer.echo(f"{'':<8}   -> {each.to_do}")
    problems = sum(each.level is Level.PROBLEM for each in found)
    if json_:
        print_json({"problems": problems, "findings": [asdict(each) for each in found]})
    raise typer.Exit(1 if problems else 0)
