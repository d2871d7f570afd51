"""Every setting there is: its name, type, default, range and meaning, each in this one place.

``lightning.toml`` has one table per class below; the environment has
``LIGHTNING_<TABLE>__<NAME>``; the command line has flags for the few that people change often.
``docs/settings.md`` and the file that ``lightning-proxy init`` writes are generated from here.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lightning_proxy.config.consequences import consequence_of
from lightning_proxy.config.policies import NAME_PATTERN, FurtherPolicySettings, check_apart
from lightning_proxy.config.table import BaseUrl, Table, overridden
from lightning_proxy.config.train import GuardSettings, TrainSettings


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ProxySettings(Table):
    """The proxy: where it listens, where it forwards to, what it captures."""

    host: str = Field(
        default="127.0.0.1", description="Address to listen on. Anything but loopback needs `token`."
    )
    port: int = Field(default=8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    token: str | None = Field(
        default=None,
        min_length=1,
        repr=False,
        description="Secret that control routes and rewards must carry as `Authorization: Bearer ...`, and "
        "agents as their API key unless they have a key issued for a rollout.",
    )
    rollout_keys_reward: bool = Field(
        default=False,
        description="Let a key issued for a rollout post rewards for that rollout, where there is a `token`. "
        "Only for agents that cannot read their own key: one that can may reward itself.",
    )
    upstream: BaseUrl | None = Field(
        default=None,
        description="Base URL of the model endpoint, as one would put it into OPENAI_BASE_URL, "
        "e.g. http://127.0.0.1:8000/v1.",
    )
    upstream_api_key: str | None = Field(
        default=None,
        repr=False,
        description="Key sent to the upstream in place of the agent's. Default: the agent's own is "
        "passed on.",
    )
    capture: Literal["auto", "tokens", "text"] = Field(
        default="auto",
        description="`tokens` asks the engine for token ids and logprobs, `text` never does, "
        "`auto` asks where the engine is vLLM.",
    )
    hold_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="How long a call is held while the engine starts or changes weights, before a 503.",
    )
    commit_timeout_s: float = Field(
        default=2.0,
        gt=0,
        description="How long the end of an answer may wait for its span to be committed before it goes out "
        "regardless.",
    )
    shutdown_timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="How long calls under way may take to end once the proxy is told to stop, before they "
        "are cut; below what `docker stop` waits (10 s) before it kills. A second signal cuts them at once.",
    )
    max_body_mb: int = Field(default=64, gt=0, description="Largest request body accepted, in MiB.")

    @model_validator(mode="after")
    def _open_to_others_needs_a_token(self) -> Self:
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"proxy.host is {self.host!r}, which lets other machines in: set proxy.token (or "
                "LIGHTNING_PROXY__TOKEN), or listen on 127.0.0.1"
            )
        return self


class UpstreamSettings(Table):
    """A further endpoint, for the models that it names.

    The first in the file whose `models` fit a call's model takes it; what fits none goes to
    `proxy.upstream`.
    """

    models: tuple[str, ...] = Field(
        min_length=1, description="Model names that go there, or patterns such as `gpt-*`."
    )
    url: BaseUrl | None = Field(
        default=None,
        description="Base URL of an endpoint that speaks the OpenAI (or, for `/v1/messages`, the Anthropic) "
        "API; calls go there as they are. With `provider`: where that provider is, if not at its usual "
        "address.",
    )
    provider: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9_]+$",
        description="Provider that speaks an API of its own, by litellm's name (`anthropic`, `bedrock`, "
        "`gemini` ...); calls are translated by litellm.",
    )
    api_key_env: str | None = Field(
        default=None, description="Environment variable that holds the key to send in place of the agent's."
    )
    api_key_file: Path | None = Field(default=None, description="File that holds that key instead.")
    capture: Literal["auto", "tokens", "text"] = Field(default="auto", description="As `proxy.capture`.")

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Self:
        for_whom = f"the upstream for {', '.join(self.models)}"
        if self.url is None and self.provider is None:
            raise ValueError(f"{for_whom} has neither url nor provider: say where the calls go")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError(f"{for_whom} has both api_key_env and api_key_file: keep one")
        return self


class StoreSettings(Table):
    """The database."""

    db: Path = Field(default=Path("lightning.db"), description="SQLite file; made on first use.")
    synchronous: Literal["normal", "full"] = Field(
        default="normal",
        description="`normal` survives the death of any process, `full` (an fsync per commit) also that "
        "of the machine.",
    )
    busy_timeout_s: float = Field(
        default=5.0, gt=0, description="How long to wait for another process's write."
    )
    keep_days: float = Field(
        default=0.0,
        ge=0,
        description="`serve` deletes rollouts in which nothing has happened for so many days, rewarded "
        "or not; 0 keeps everything.",
    )


class PolicySettings(Table):
    """The model that learns."""

    name: str = Field(
        default="policy",
        pattern=NAME_PATTERN,
        description="Model name that agents ask for; only calls for it are trained on.",
    )
    model: Path | None = Field(
        default=None, description="Directory with the weights to begin with (Hugging Face layout)."
    )


class EngineSettings(Table):
    """vLLM, where `serve --model` starts it."""

    args: tuple[str, ...] = Field(default=(), description="Further arguments for vLLM's OpenAI server.")
    env: dict[str, str] = Field(default={}, description="Further environment for vLLM.")
    start_timeout_s: float = Field(
        default=900.0, gt=0, description="How long vLLM may take to become healthy."
    )
    log: Path = Field(default=Path("lightning-engine.log"), description="Where vLLM's output goes.")
    max_restarts: int = Field(
        default=3, ge=0, description="Restarts within ten minutes before `serve` gives up."
    )


class FailureSettings(Table):
    """What counts as a failure beyond what protocols say, and what training makes of each class."""

    tool_error_patterns: tuple[str, ...] = Field(
        default=(r"\s*Error\b", r"\s*Traceback \(most recent call last\)"),
        description="A tool's result whose text begins like one of these regular expressions is a "
        "`tool_failure`, beside what the protocols say.",
    )
    refusal_patterns: tuple[str, ...] = Field(
        default=(),
        description="A reply in whose first 2,000 characters one of these regular expressions is found is "
        "a `refusal`, beside what the protocols say.",
    )
    loop_after: int = Field(
        default=5,
        ge=0,
        description="Equal replies or requests in a row with which an agent is in a loop; 0 looks for none.",
    )
    silence_s: float = Field(
        default=3600.0,
        ge=0,
        description="A rollout that is open, unrewarded and silent for this long after a call that failed, "
        "or after a tool call that nobody answered, counts as failed; 0 presumes nothing.",
    )
    training: dict[str, str] = Field(
        default={},
        description="What training does with a class of failure: `train`, `mask`, `partial 0.5`, "
        "`penalty -0.5` or `drop`. docs/failures.md has the classes and what each does by default.",
    )

    @field_validator("tool_error_patterns", "refusal_patterns")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _loops_are_repetitions(self) -> Self:
        if self.loop_after == 1:
            raise ValueError("failures.loop_after is 1, but one reply is no loop: 2 or more, or 0 for none")
        return self

    @field_validator("training")
    @classmethod
    def _are_consequences(cls, training: dict[str, str]) -> dict[str, str]:
        for name, text in training.items():
            consequence_of(name, text)
        return training


class RoleSettings(Table):
    """One agent of a multi-agent system, by what it sends. All that is given here must hold.

    The first role in the file that fits a call is its role, unless path or header name one.
    `lightning-proxy spans roles` lists the agents seen, with lines to paste here.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,199}$", description="What the role is called in spans."
    )
    fingerprint: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{8}$",
        description="Of system prompt and tools together, as `lightning-proxy spans roles` shows it.",
    )
    system_contains: str | None = Field(
        default=None, min_length=1, description="A piece of the system prompt, letter by letter."
    )
    tools: tuple[str, ...] = Field(
        default=(), description="Names of tools that it has, with or without others."
    )

    @model_validator(mode="after")
    def _tells_something(self) -> Self:
        if self.fingerprint is None and self.system_contains is None and not self.tools:
            raise ValueError(f"role {self.name!r} needs a fingerprint, system_contains or tools")
        return self


class RewardSettings(Table):
    """A reward that counts otherwise than as it is: by its name.

    A rollout's return is the sum of its rewards, each times its weight, and with the sign turned where less
    is better. A reward without an entry here counts with weight 1, and more of it is better.
    """

    name: str = Field(min_length=1, description="Name that the reward is posted under.")
    weight: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="What it is multiplied by; 0 keeps it in the ledger only.",
    )
    direction: Literal["maximize", "minimize"] = Field(
        default="maximize", description="Whether more of it is better, or less."
    )
    roles: tuple[str, ...] = Field(
        default=(),
        description="Roles whose return it is part of, with `train.group_by_role`; none named: all.",
    )


class AutomaticRewardSettings(Table):
    """Rewards from what is in the traffic already, entered into the ledger when `train` begins.

    All are off by default. They are entered for a rollout that has ended, has been rewarded, or has been
    quiet for `quiet_s`; once each, under their own names with the source `automatic`.
    """

    tool_error: float = Field(
        default=0.0,
        allow_inf_nan=False,
        description="For each call whose tool call failed, as the agent reports it to the model, e.g. -0.1; "
        "0: off.",
    )
    malformed_tool_call: float = Field(
        default=0.0,
        allow_inf_nan=False,
        description="For each call that asks for a tool that there is not, or with arguments that do not "
        "parse or fit; 0: off.",
    )
    truncated: float = Field(
        default=0.0,
        allow_inf_nan=False,
        description="For each call whose answer ended at its token limit; 0: off.",
    )
    exit_code: bool = Field(
        default=False,
        description="1 for a rollout that succeeded (its command's exit code was 0), 0 for one that failed.",
    )
    function: str | None = Field(
        default=None,
        pattern=r"^.+\.py:[A-Za-z_][A-Za-z0-9_]*$",
        description="Python function that judges a rollout, as `path/to/file.py:name`; docs/rewards.md says "
        "what it is given.",
    )
    quiet_s: float = Field(
        default=600.0, gt=0, description="Silence after which a rollout that nobody ended counts as ended."
    )


class ExplorationSettings(Table):
    """Rollouts that are sampled at a temperature of ours, for agents that run at 0 and so never explore.

    The first entry whose `role` fits decides. Spans say so (`sampling.explored`); only calls to the
    trained policy are changed.
    """

    role: str | None = Field(default=None, description="Role that explores; left out: every role.")
    temperature: float = Field(default=1.0, gt=0, le=2, description="Temperature in place of the agent's.")
    share: float = Field(default=1.0, gt=0, le=1, description="Share of rollouts that explore.")


class RedactionSettings(Table):
    """What must not be kept. It is taken out of each span before it is written; agent and engine get all.

    A rule has a `pattern` or a `builtin`, which is searched in all texts, or a `path`, whose values are
    replaced whole, or a pattern and the path to search it at. A span that lost something has no token ids
    either, and is not trained on: docs/redaction.md.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}$",
        description="What the rule is called; spans say by name which rules changed them.",
    )
    builtin: Literal["email", "credit_card", "iban", "phone", "api_key"] | None = Field(
        default=None, description="A pattern that comes with us."
    )
    pattern: str | None = Field(
        default=None, min_length=1, description="Regular expression, in Python's notation."
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="JSON path in the body, e.g. `metadata.email`, `messages[*].content`, `**.ssn`.",
    )
    where: Literal["request", "response", "both"] = Field(
        default="both", description="In which of the two bodies the rule looks."
    )
    replacement: str = Field(default="[redacted]", description="What is kept in its place.")
    roles: tuple[str, ...] = Field(default=(), description="Only for these roles' calls; default: all.")

    @model_validator(mode="after")
    def _looks_for_something(self) -> Self:
        if self.builtin is not None and self.pattern is not None:
            raise ValueError(f"redaction rule {self.name!r} has both builtin and pattern: make two of it")
        if self.builtin is None and self.pattern is None and self.path is None:
            raise ValueError(f"redaction rule {self.name!r} needs a builtin, a pattern or a path")
        return self


class Settings(Table):
    """All tables of ``lightning.toml``."""

    proxy: ProxySettings = ProxySettings()
    store: StoreSettings = StoreSettings()
    policy: PolicySettings = PolicySettings()
    engine: EngineSettings = EngineSettings()
    train: TrainSettings = TrainSettings()
    guard: GuardSettings = GuardSettings()
    failures: FailureSettings = FailureSettings()
    upstreams: tuple[UpstreamSettings, ...] = ()
    automatic_rewards: AutomaticRewardSettings = AutomaticRewardSettings()
    roles: tuple[RoleSettings, ...] = ()
    rewards: tuple[RewardSettings, ...] = ()
    exploration: tuple[ExplorationSettings, ...] = ()
    redaction: tuple[RedactionSettings, ...] = ()
    policies: tuple[FurtherPolicySettings, ...] = ()

    @field_validator("policies")
    @classmethod
    def _policies_are_apart_and_valid(
        cls, policies: tuple[FurtherPolicySettings, ...], info: ValidationInfo
    ) -> tuple[FurtherPolicySettings, ...]:
        if not {"policy", "train", "engine"} <= info.data.keys():
            return policies  # one of those is wrong itself, and that is said
        check_apart(info.data["policy"].name, policies)
        for each in policies:
            overridden(info.data["train"], each.train, "train")
            overridden(info.data["engine"], each.engine, "engine")
        return policies

    @field_validator("rewards")
    @classmethod
    def _one_entry_a_name(cls, rewards: tuple[RewardSettings, ...]) -> tuple[RewardSettings, ...]:
        names = [reward.name for reward in rewards]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the reward {twice[0]!r} has two entries: keep one")
        return rewards

    @model_validator(mode="after")
    def _rewards_of_roles_need_groups_by_role(self) -> Self:
        for name, roles in self.reward_roles.items():
            if not (
                self.train.group_by_role and all(p.train.get("group_by_role", True) for p in self.policies)
            ):
                raise ValueError(
                    f"the reward {name!r} is for the roles {', '.join(roles)} only, which needs "
                    "train.group_by_role = true, of every policy: else all roles have the same return"
                )
        return self

    @property
    def reward_roles(self) -> dict[str, tuple[str, ...]]:
        """The roles that a reward is for, by its name, where it is not for all."""
        return {reward.name: reward.roles for reward in self.rewards if reward.roles}

    @property
    def reward_rule(self) -> dict[str, Any]:
        """What the store's ``RewardRule`` is made of."""
        return {
            "weights": self.reward_weights,
            "late": self.train.late_rewards == "retrain",
            "roles": self.reward_roles,
            "wait_s": self.train.group_wait_s,
        }

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight by name, negative where less is better."""
        return {
            reward.name: reward.weight if reward.direction == "maximize" else -reward.weight
            for reward in self.rewards
        }
