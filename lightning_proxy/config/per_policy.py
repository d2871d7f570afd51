"""Settings of several policies taken apart: each as if it were the only one."""

from __future__ import annotations

from lightning_proxy.config.settings import PolicySettings, Settings
from lightning_proxy.config.table import overridden
from lightning_proxy.errors import ConfigError


def policy_names(settings: Settings) -> tuple[str, ...]:
    """Every policy that is configured, that of ``[policy]`` first."""
    return settings.policy.name, *(each.name for each in settings.policies)


def for_policy(settings: Settings, name: str) -> Settings:
    """The settings as if this policy were the only one: its ``[policy]``, ``[train]`` and ``[engine]``.

    Raises ``ConfigError`` where there is no such policy.
    """
    if name == settings.policy.name:
        return settings.model_copy(update={"policies": ()})
    found = next((each for each in settings.policies if each.name == name), None)
    if found is None:
        there = ", ".join(map(repr, policy_names(settings)))
        raise ConfigError(f"no policy {name!r} is configured; there are {there}")
    log = settings.engine.log
    engine = {"log": log.with_stem(f"{log.stem}-{found.directory}"), **found.engine}
    return settings.model_copy(
        update={
            "policy": PolicySettings(name=found.name, model=found.model),
            "train": overridden(settings.train, {**found.train, "roles": found.roles}, "train"),
            "engine": overridden(settings.engine, engine, "engine"),
            "policies": (),
        }
    )
