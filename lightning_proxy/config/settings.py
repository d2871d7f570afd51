"""Every setting there is: its name, type, default, range and meaning, each in this one place.

``lightning.toml`` has one table per class below; the environment has
``LIGHTNING_<TABLE>__<NAME>``; the command line has flags for the few that people change often.
``docs/settings.md`` and the file that ``lightning-proxy init`` writes are generated from here.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL that begins with http:// or https://")
    if parts.query or parts.fragment:
        raise ValueError("must be a URL without a query")
    return url.rstrip("/")


def _root_url(url: str) -> str:
    url = _base_url(url)
    if urlsplit(url).path.endswith("/v1"):
        raise ValueError("must be the proxy's own address, without /v1")
    return url


BaseUrl = Annotated[str, AfterValidator(_base_url)]
RootUrl = Annotated[str, AfterValidator(_root_url)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ProxySettings(_Table):
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
    max_body_mb: int = Field(default=64, gt=0, description="Largest request body accepted, in MiB.")

    @model_validator(mode="after")
    def _open_to_others_needs_a_token(self) -> Self:
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"proxy.host is {self.host!r}, which lets other machines in: set proxy.token (or "
                "LIGHTNING_PROXY__TOKEN), or listen on 127.0.0.1"
            )
        return self


class UpstreamSettings(_Table):
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


class StoreSettings(_Table):
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


class PolicySettings(_Table):
    """The model that learns."""

    name: str = Field(
        default="policy",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$",
        description="Model name that agents ask for; only calls for it are trained on.",
    )
    model: Path | None = Field(
        default=None, description="Directory with the weights to begin with (Hugging Face layout)."
    )


class EngineSettings(_Table):
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


class TrainSettings(_Table):
    """The trainer."""

    proxy_url: RootUrl = Field(
        default="http://127.0.0.1:8080",
        description="The proxy behind which new weights take over, without `/v1`. Where it is not given, "
        "it follows `proxy.host` and `proxy.port`.",
    )
    runs_dir: Path = Field(
        default=Path("lightning-runs"),
        description="Where checkpoints are written; the engine must be able to read it.",
    )
    estimator: str = Field(default="grpo", description="Advantage estimator, by verl's name.")
    norm_by_std: bool = Field(
        default=True, description="Divide a group's advantages by its standard deviation (GRPO)."
    )
    policy_loss: str = Field(default="vanilla", description="Policy loss, by verl's name.")
    clip_ratio: float = Field(default=0.2, gt=0, description="PPO clip range.")
    learning_rate: float = Field(default=1e-6, gt=0, description="AdamW's constant learning rate.")
    adam_eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    grad_clip: float = Field(default=1.0, gt=0, description="Largest gradient norm.")
    epochs: int = Field(default=1, ge=1, description="Passes over what a run drained.")
    mini_batch_rows: int = Field(default=64, ge=1, description="Trajectories per optimiser step.")
    micro_batch_tokens: int = Field(default=8192, ge=1, description="Most tokens in one forward pass.")
    max_row_tokens: int = Field(
        default=32768, ge=2, description="Longer trajectories are left out, and counted."
    )
    lora_rank: int = Field(
        default=0, ge=0, description="Train a LoRA adapter of this rank; 0 trains the full weights."
    )
    lora_alpha: int = Field(default=32, ge=1, description="LoRA's alpha.")
    min_rollouts: int = Field(
        default=8, ge=1, description="Fewer rewarded rollouts than this are left for a later run."
    )
    max_rollouts: int = Field(
        default=4096, ge=1, description="Most rollouts that one run drains, oldest first."
    )
    min_group_size: int = Field(
        default=2, ge=2, description="Groups smaller than this are left for a later run."
    )
    lease_s: float = Field(
        default=600.0, gt=0, description="A run that is silent for this long has lost what it drained."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where the update runs.")
    workers: int = Field(
        default=1, ge=1, description="Workers of the update; more than one runs them on Ray."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Precision of the update's forward pass."
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 leaves the choice to torch.")
    seed: int = Field(default=0, ge=0, description="Seed of everything random in the update.")
    verify_tolerance: float = Field(
        default=0.05,
        gt=0,
        description="Largest difference between trainer's and engine's logprobs of the fixed prompt, "
        "above which a new version is rejected.",
    )
    keep_versions: int = Field(default=3, ge=1, description="Checkpoints of retired versions kept on disk.")
    watch_interval_s: float = Field(
        default=30.0, gt=0, description="Pause between the passes of `train --watch`."
    )

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.max_rollouts < self.min_rollouts:
            raise ValueError(
                f"train.max_rollouts is {self.max_rollouts} but train.min_rollouts is {self.min_rollouts}: "
                "a run could never begin; raise the first or lower the second"
            )
        return self


class RoleSettings(_Table):
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


class RedactionSettings(_Table):
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


class Settings(_Table):
    """All tables of ``lightning.toml``."""

    proxy: ProxySettings = ProxySettings()
    store: StoreSettings = StoreSettings()
    policy: PolicySettings = PolicySettings()
    engine: EngineSettings = EngineSettings()
    train: TrainSettings = TrainSettings()
    upstreams: tuple[UpstreamSettings, ...] = ()
    roles: tuple[RoleSettings, ...] = ()
    redaction: tuple[RedactionSettings, ...] = ()
