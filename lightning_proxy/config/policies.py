"""``[[policies]]``: what a further policy is, and what must hold of all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lightning_proxy.config.table import BaseUrl, Table

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
# Settings of [train] that cannot differ from policy to policy, with where they are given instead.
_NOT_IN_TRAIN = {
    "roles": "give `roles` beside the policy's name",
    "proxy_url": "one proxy is before all policies: give it in [train]",
    "device": "one process trains all policies: give it in [train]",
    "watch_interval_s": "`train --watch` goes round all policies: give it in [train]",
}


class FurtherPolicySettings(Table):
    """A further policy that learns from the same traffic, with versions and training runs of its own.

    What is not said here is as for `[policy]`. docs/training.md has an example.
    """

    name: str = Field(
        pattern=NAME_PATTERN,
        description="Its name, and the model name that agents ask for; `[policy] name` is another one.",
    )
    model: Path | None = Field(
        default=None, description="Directory with the weights to begin with (Hugging Face layout)."
    )
    upstream: BaseUrl | None = Field(
        default=None,
        description="Base URL of the vLLM that serves it under this name. Not given: `serve` starts one on "
        "`model`.",
    )
    api_key_env: str | None = Field(
        default=None,
        description="Environment variable that holds the key to send there in place of the agent's.",
    )
    api_key_file: Path | None = Field(default=None, description="File that holds that key instead.")
    capture: Literal["auto", "tokens", "text"] = Field(default="auto", description="As `proxy.capture`.")
    roles: tuple[str, ...] = Field(
        default=(), description="Roles whose calls are trained on; none named: all, and calls without one."
    )
    route: bool = Field(
        default=False,
        description="Calls of `roles` go to this policy though they ask for `[policy] name`, for agents that "
        "all ask for one model. Its upstream must serve both names (vLLM: `--served-model-name A B`).",
    )
    train: dict[str, Any] = Field(default={}, description="What differs from `[train]` for it.")
    engine: dict[str, Any] = Field(
        default={}, description="What differs from `[engine]` for it, where `serve` starts its vLLM."
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.upstream is None and self.model is None:
            raise ValueError(
                f"the policy {self.name!r} has neither upstream nor model: give the URL of the vLLM that "
                "serves it, or the directory with its weights, and `serve` starts one"
            )
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError(f"the policy {self.name!r} has both api_key_env and api_key_file: keep one")
        if self.route and not self.roles:
            raise ValueError(f"the policy {self.name!r} has route = true but no roles whose calls go to it")
        if wrong := [key for key in self.train if key in _NOT_IN_TRAIN]:
            raise ValueError(f"train.{wrong[0]} of the policy {self.name!r}: {_NOT_IN_TRAIN[wrong[0]]}")
        return self

    @property
    def directory(self) -> str:
        """What its directory in ``train.runs_dir`` is called."""
        return directory_of(self.name)


def directory_of(policy: str) -> str:
    """What a policy's directory in ``train.runs_dir`` is called."""
    return policy.replace("/", "--")


def check_apart(main: str, others: Sequence[FurtherPolicySettings]) -> None:
    """Raise ``ValueError`` where two policies cannot be told apart. ``main``: ``[policy] name``."""
    seen = {directory_of(main): main}
    routed: dict[str, str] = {}
    for each in others:
        if (other := seen.get(each.directory)) is not None:
            raise ValueError(
                f"the policies {other!r} and {each.name!r} need names that differ, and not in / and -- only"
            )
        seen[each.directory] = each.name
        for role in each.roles if each.route else ():
            if role in routed:
                raise ValueError(
                    f"calls of the role {role!r} cannot go to {routed[role]!r} and to {each.name!r}: keep one"
                )
            routed[role] = each.name
