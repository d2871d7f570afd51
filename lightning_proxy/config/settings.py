"""Every setting there is: its name, type, default, range and meaning, each in this one place.

``lightning.toml`` has one table per class below; the environment has
``LIGHTNING_<TABLE>__<NAME>``; the command line has flags for the few that people change often.
``docs/settings.md`` and the file that ``lightning-proxy init`` writes are generated from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ProxySettings(_Table):
    """The proxy: where it listens, where it forwards to, what it captures."""

    host: str = Field("127.0.0.1", description="Address to listen on. Anything but loopback needs `token`.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    token: str | None = Field(
        None,
        description="Secret that control routes and rewards must carry as `Authorization: Bearer ...`, and agents as "
        "their API key unless they have a key issued for a rollout.",
    )
    upstream: str | None = Field(
        None,
        description="Base URL of the model endpoint, as one would put it into OPENAI_BASE_URL, "
        "e.g. http://127.0.0.1:8000/v1.",
    )
    upstream_api_key: str | None = Field(
        None, description="Key sent to the upstream in place of the agent's. Default: the agent's own is passed on."
    )
    capture: Literal["auto", "tokens", "text"] = Field(
        "auto",
        description="`tokens` asks the engine for token ids and logprobs, `text` never does, "
        "`auto` asks where the engine is vLLM.",
    )
    hold_timeout_s: float = Field(
        300.0, gt=0, description="How long a call is held while the engine starts or changes weights, before a 503."
    )
    commit_timeout_s: float = Field(
        2.0, gt=0, description="How long the end of an answer may wait for its span to be committed before it goes out "
        "regardless."
    )
    max_body_mb: int = Field(64, gt=0, description="Largest request body accepted, in MiB.")


class StoreSettings(_Table):
    """The database."""

    db: Path = Field(Path("lightning.db"), description="SQLite file; made on first use.")
    synchronous: Literal["normal", "full"] = Field(
        "normal",
        description="`normal` survives the death of any process, `full` (an fsync per commit) also that of the machine.",
    )
    busy_timeout_s: float = Field(5.0, gt=0, description="How long to wait for another process's write.")


class PolicySettings(_Table):
    """The model that learns."""

    name: str = Field(
        "policy", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", description="Model name that agents ask for; only calls "
        "for it are trained on."
    )
    model: Path | None = Field(None, description="Directory with the weights to begin with (Hugging Face layout).")


class EngineSettings(_Table):
    """vLLM, where `serve --model` starts it."""

    args: tuple[str, ...] = Field((), description="Further arguments for vLLM's OpenAI server.")
    env: dict[str, str] = Field({}, description="Further environment for vLLM.")
    start_timeout_s: float = Field(900.0, gt=0, description="How long vLLM may take to become healthy.")
    log: Path = Field(Path("lightning-engine.log"), description="Where vLLM's output goes.")
    max_restarts: int = Field(3, ge=0, description="Restarts within ten minutes before `serve` gives up.")


class TrainSettings(_Table):
    """The trainer."""

    proxy_url: str = Field("http://127.0.0.1:8080", description="The proxy behind which new weights take over.")
    runs_dir: Path = Field(Path("lightning-runs"), description="Where checkpoints are written; the engine must be able "
                           "to read it.")
    estimator: str = Field("grpo", description="Advantage estimator, by verl's name.")
    norm_by_std: bool = Field(True, description="Divide a group's advantages by its standard deviation (GRPO).")
    policy_loss: str = Field("vanilla", description="Policy loss, by verl's name.")
    clip_ratio: float = Field(0.2, gt=0, description="PPO clip range.")
    learning_rate: float = Field(1e-6, gt=0, description="AdamW's constant learning rate.")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    epochs: int = Field(1, ge=1, description="Passes over what a run drained.")
    mini_batch_rows: int = Field(64, ge=1, description="Trajectories per optimiser step.")
    micro_batch_tokens: int = Field(8192, ge=1, description="Most tokens in one forward pass.")
    max_row_tokens: int = Field(32768, ge=2, description="Longer trajectories are left out, and counted.")
    lora_rank: int = Field(0, ge=0, description="Train a LoRA adapter of this rank; 0 trains the full weights.")
    lora_alpha: int = Field(32, ge=1, description="LoRA's alpha.")
    min_rollouts: int = Field(8, ge=1, description="Fewer rewarded rollouts than this are left for a later run.")
    max_rollouts: int = Field(4096, ge=1, description="Most rollouts that one run drains, oldest first.")
    min_group_size: int = Field(2, ge=2, description="Groups smaller than this are left for a later run.")
    lease_s: float = Field(600.0, gt=0, description="A run that is silent for this long has lost what it drained.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the update runs.")
    workers: int = Field(1, ge=1, description="Workers of the update; more than one runs them on Ray.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the update's forward pass.")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 leaves the choice to torch.")
    seed: int = Field(0, ge=0, description="Seed of everything random in the update.")
    verify_tolerance: float = Field(
        0.05, gt=0, description="Largest difference between trainer's and engine's logprobs of the fixed prompt, "
        "above which a new version is rejected."
    )
    keep_versions: int = Field(3, ge=1, description="Checkpoints of retired versions kept on disk.")
    watch_interval_s: float = Field(30.0, gt=0, description="Pause between the passes of `train --watch`.")


class Settings(_Table):
    """All tables of ``lightning.toml``."""

    proxy: ProxySettings = ProxySettings()
    store: StoreSettings = StoreSettings()
    policy: PolicySettings = PolicySettings()
    engine: EngineSettings = EngineSettings()
    train: TrainSettings = TrainSettings()
