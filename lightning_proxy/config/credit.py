"""The part of ``[train]`` that says what is compared with what, and who gets the credit."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lightning_proxy.config.table import Table


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
        default=256, ge=1, description="How many earlier returns a running baseline looks back on."
    )

    @model_validator(mode="after")
    def _discount_has_an_effect(self) -> Self:
        if self.credit == "identical" and self.discount != 1:
            raise ValueError(
                f"train.discount is {self.discount} but train.credit is 'identical', which has none: "
                "set train.credit to 'discounted' or 'return_to_go', or leave discount at 1"
            )
        return self
