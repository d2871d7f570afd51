"""The tables of the trainer: what it compares, how it updates, when it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from lightning_proxy.config.table import RootUrl, Table


class CreditSettings(Table):
    """Credit, groups and baselines."""

    credit: Literal["identical", "discounted", "return_to_go"] = Field(
        default="identical",
        description="What a call is credited with: `identical` the rollout's whole return, `discounted` the "
        "same times `discount` for each call that came after it, `return_to_go` what was earned from it "
        "on, compared step by step.",
    )
    discount: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="What a reward keeps for each call that lies between (`discounted`, `return_to_go`).",
    )
    group_by_role: bool = Field(
        default=False,
        description="Compare a role's calls with those of the same role only. Needed where `[[rewards]]` are "
        "for some roles only.",
    )
    group_prompts: Literal["exact", "normalised"] = Field(
        default="exact",
        description="When rollouts without a task id are of the same task: the same first prompt to the "
        "token, or to the letter but for dates, times, ids and long numbers.",
    )
    running_baseline: bool = Field(
        default=True,
        description="Compare rollouts without a task id, whose first prompt no other one has, with the "
        "last returns of their like, whatever the prompt. Off: they wait until the prompt comes again.",
    )
    baseline_window: int = Field(
        default=256, ge=1, description="How many earlier returns a group or a running baseline looks back on."
    )

    @model_validator(mode="after")
    def _discount_has_an_effect(self) -> Self:
        if self.credit == "identical" and self.discount != 1:
            raise ValueError(
                f"train.discount is {self.discount} but train.credit is 'identical', which has none: "
                "set train.credit to 'discounted' or 'return_to_go', or leave discount at 1"
            )
        return self


class TrainSettings(CreditSettings):
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
    algorithm: Literal["rl", "sft", "dpo"] = Field(
        default="rl",
        description="What a pass learns by. `rl`: LightningRL. `sft`: the likelihood of the best rollouts "
        "and of demonstrations. `dpo`: preferences, of demonstrations over what was answered and of the "
        "best rollout of a group over the worst.",
    )
    sft_min_return: float = Field(
        default=1.0,
        allow_inf_nan=False,
        description="Of the rollouts of a group, SFT learns from those with the highest return, if it is at "
        "least this.",
    )
    dpo_beta: float = Field(
        default=0.1, gt=0, description="DPO's beta: the larger, the nearer to the reference policy."
    )
    dpo_min_gap: float = Field(
        default=0.0, ge=0, description="Smallest difference of two returns that makes a DPO pair of a group."
    )
    dpo_reference: Literal["parent", "base"] = Field(
        default="parent",
        description="DPO's reference policy: the version that the pass begins with, or version 0.",
    )
    roles: tuple[str, ...] = Field(
        default=(), description="Roles whose calls are trained on; none named: all, and calls without one."
    )
    estimator: str = Field(default="grpo", description="Advantage estimator, by verl's name.")
    norm_by_std: bool = Field(
        default=True, description="Divide a group's advantages by its standard deviation (GRPO)."
    )
    policy_loss: str = Field(default="vanilla", description="Policy loss, by verl's name.")
    weigh: Literal["token", "rollout"] = Field(
        default="token",
        description="What counts the same in the loss of RL: every generated token, or every rollout.",
    )
    clip_ratio: float = Field(default=0.2, gt=0, lt=1, description="PPO clip range, downwards and upwards.")
    clip_ratio_high: float | None = Field(
        default=None, gt=0, description="PPO clip range upwards, where it differs (DAPO's clip-higher)."
    )
    kl_coef: float = Field(
        default=0.0, ge=0, description="Weight of the divergence from version 0 in the loss; 0 leaves it out."
    )
    kl_estimator: Literal["k1", "k2", "k3", "k3+", "abs"] = Field(
        default="k3+",
        description="How that divergence is estimated, by verl's names. `k3` is GRPO's; `k3+` has its value "
        "and the gradient of `k2`, which is the divergence's own.",
    )
    entropy_coef: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the policy's entropy in the loss (a bonus); 0 leaves it out.",
    )
    importance: Literal["decoupled", "behaviour"] = Field(
        default="decoupled",
        description="Off-policy correction. `decoupled`: clipping is about the weights that the update "
        "starts from, and tokens that other weights (or another precision) sampled are weighed by their "
        "importance, cut at `importance_cap`. `behaviour`: clipping is about whatever sampled them.",
    )
    importance_cap: float = Field(
        default=2.0, ge=1, description="Largest importance weight of a token (`decoupled`)."
    )
    max_version_age: int = Field(
        default=8,
        ge=0,
        description="Calls that weights more than this many updates away from the present ones answered are "
        "left out, and counted. Updates are counted along the versions' parents, not by their numbers.",
    )
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
    group_wait_s: float = Field(
        default=600.0,
        ge=0,
        description="How long rollouts of the task pool wait, from the last sign of life of their group, for "
        "members that nobody carries out and for rewards of those that succeeded. Members that an agent "
        "carries out are waited for as long as their lease is kept.",
    )
    late_rewards: Literal["retrain", "ignore"] = Field(
        default="retrain",
        description="What a reward does that gives a rollout another return after it was trained on: "
        "`retrain` lets it wait for a run again, `ignore` leaves it.",
    )
    lease_s: float = Field(
        default=600.0, gt=0, description="A run that is silent for this long has lost what it drained."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where the update runs.")
    workers: int = Field(
        default=1,
        ge=1,
        description="Workers of the update; more than one runs them on Ray (the cluster of `RAY_ADDRESS`, "
        "where that is set), but not with `kl_coef` or DPO's reference `base`.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Precision of the update's forward pass."
    )
    flash_attention: bool = Field(
        default=False,
        description="The update's attention by flash-attention (`flash_attn`, to be installed) on rows "
        "without padding, in place of PyTorch's own. On CUDA only, and not yet run there.",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 leaves the choice to torch.")
    seed: int = Field(default=0, ge=0, description="Seed of everything random in the update.")
    verify_tolerance: float = Field(
        default=0.05,
        gt=0,
        description="Largest difference between trainer's and engine's logprobs of the fixed prompt, "
        "above which a new version is rejected. Made for float32; where engine and update compute in "
        "bfloat16, by different kernels, docs/full-size.md takes 0.3.",
    )
    keep_versions: int = Field(
        default=3,
        ge=1,
        description="Checkpoints kept on disk of versions that served, the newest, beside the one that does. "
        "Its parent and the guard's best stay as well; rejected ones go at once.",
    )
    watch_interval_s: float = Field(
        default=30.0, gt=0, description="Pause between the passes of `train --watch`."
    )

    @property
    def learns_from_demonstrations(self) -> bool:
        """Whether a demonstration makes a rollout ready for the algorithm."""
        return self.algorithm != "rl"

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.max_rollouts < self.min_rollouts:
            raise ValueError(
                f"train.max_rollouts is {self.max_rollouts} but train.min_rollouts is {self.min_rollouts}: "
                "a run could never begin; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _one_worker_where_version_0_is_loaded_too(self) -> Self:
        if self.workers > 1 and (wanted_by := self._version_0_is_for()) is not None:
            raise ValueError(
                f"train.workers is {self.workers} but {wanted_by}, for which version 0 is loaded beside the "
                "weights that are trained: its workers would wait for ever for what the others hold; "
                "set train.workers to 1"
            )
        return self

    def _version_0_is_for(self) -> str | None:
        if self.algorithm == "rl" and self.kl_coef > 0:
            return f"train.kl_coef is {self.kl_coef:g}"
        if self.algorithm == "dpo" and self.dpo_reference == "base":
            return "train.dpo_reference is 'base'"
        return None


class GuardSettings(Table):
    """When a training run stops instead of publishing. Collapse goes one way: better not to begin."""

    max_kl: float = Field(
        default=0.5,
        gt=0,
        description="Largest mean divergence per token (nats) from the weights the run began with, measured "
        "at each step before that step's own update, so that a pass of one step cannot exceed it; with "
        "importance `behaviour` from the weights that sampled. Above it the run fails, and what it drained "
        "waits for the next.",
    )
    max_reward_drop: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Largest loss of mean reward against the best of the last `window` runs, as a share of "
        "the range of rewards seen, if its 99.7% interval leaves no doubt of it. Beyond it nothing is "
        "trained, what was drained counts as used, and a line says which version was best.",
    )
    max_entropy_rise: float = Field(
        default=5.0,
        gt=1,
        description="Largest entropy of the sampled tokens, in multiples of the median of the last `window` "
        "runs. Beyond it as `max_reward_drop`.",
    )
    min_mixed_groups: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Smallest share of groups whose returns differ; below it the run makes no update.",
    )
    window: int = Field(
        default=20,
        ge=2,
        description="Runs that are looked back on, of those that saw rollouts of their version for the first "
        "time.",
    )
    roll_back: bool = Field(
        default=False,
        description="After a drop of reward or a rise of entropy, go back to the best version.",
    )
