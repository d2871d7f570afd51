from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_proxy.errors import TrainingError
from lightning_proxy.store import RecordedRollout, Span
from lightning_proxy.trainer.batches import pack
from lightning_proxy.trainer.sampling import PLAIN, Sampling, Unknowable, engine_defaults, sampling_of
from lightning_proxy.trainer.trajectories import merge
from lightning_proxy.trainer.transitions import LeftOut, Reason, Terms, Transition, transitions_of
from tests.trainer.recording import POLICY, generation, recorded, span


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ({}, PLAIN),
        ({"temperature": 1}, PLAIN),
        ({"temperature": 0.7}, Sampling(0.7)),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 20}, Sampling(0.7, 20, 0.9)),
        ({"top_k": -1, "top_p": 1.0, "min_p": 0.05}, Sampling(min_p=0.05)),
        ({"temperature": 0}, Unknowable.GREEDY),
        ({"temperature": None}, PLAIN),
        ({"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}, PLAIN),
        ({"presence_penalty": 0.1}, Unknowable.PENALISED),
        ({"repetition_penalty": 1.1}, Unknowable.PENALISED),
        ({"logit_bias": {}}, PLAIN),
        ({"logit_bias": {"5": 1}}, Unknowable.PENALISED),
        ({"min_tokens": 4}, Unknowable.PENALISED),
        ({"tool_choice": "auto"}, PLAIN),
        ({"tool_choice": "required"}, Unknowable.CONSTRAINED),
        ({"tool_choice": {"type": "auto"}}, PLAIN),
        ({"tool_choice": {"type": "any"}}, Unknowable.CONSTRAINED),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, Unknowable.CONSTRAINED),
        ({"response_format": {"type": "text"}}, PLAIN),
        ({"response_format": {"type": "json_object"}}, Unknowable.CONSTRAINED),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Unknowable.CONSTRAINED),
        ({"temperature": "warm"}, Unknowable.MALFORMED),
        ({"top_k": [3]}, Unknowable.MALFORMED),
    ],
)
def test_what_a_request_says_is_a_distribution_or_a_reason(
    requested: dict[str, Any], expected: Sampling | Unknowable
) -> None:
    assert sampling_of(requested, {}) == expected


def test_what_the_request_leaves_open_is_the_engines_default() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert sampling_of({}, defaults) == Sampling(0.6, 20, 0.95)
    assert sampling_of({"temperature": 1.0, "top_p": 1.0, "top_k": 0}, defaults) == PLAIN
    assert sampling_of({}, {"repetition_penalty": 1.05}) is Unknowable.PENALISED


def test_the_engines_defaults_are_in_the_models_generation_config(tmp_path: Path) -> None:
    assert engine_defaults(None) == {}
    assert engine_defaults(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_k": None, "eos_token_id": 2}))
    assert engine_defaults(tmp_path) == {"temperature": 0.6}
    file.write_text("[]")
    with pytest.raises(TrainingError, match="generation_config"):
        engine_defaults(tmp_path)


def convert(*spans: Span, version: int | None = 0) -> tuple[tuple[Transition, ...], LeftOut]:
    left_out = LeftOut()
    each: RecordedRollout = recorded("r", spans)
    return transitions_of(each, Terms(POLICY, 100, version=version), left_out), left_out


def test_calls_whose_distribution_is_not_known_are_left_out_and_counted() -> None:
    made, left_out = convert(
        span("r", generation([1], [2]), sampling={"temperature": 0.0}),
        span("r", generation([1], [3]), sampling={"frequency_penalty": 1}),
        span("r", generation([1], [4]), sampling={"tool_choice": "required"}),
        span("r", generation([1], [5])),
    )
    assert [list(each.response_ids) for each in made] == [[5]]
    assert left_out.calls == {Reason.GREEDY: 1, Reason.PENALISED: 1, Reason.CONSTRAINED: 1}


def test_raw_logprobs_of_a_shaped_distribution_serve_only_where_its_weights_are_at_hand() -> None:
    warm = {"temperature": 0.7}
    told = {**warm, "logprobs_mode": "processed_logprobs"}
    fresh = span("r", generation([1], [2]), sampling=warm, policy_version=3, policy_version_end=3)
    stale = span("r", generation([1], [3]), sampling=warm, policy_version=2, policy_version_end=2)
    mixed = span("r", generation([1], [4]), sampling=warm, policy_version=2, policy_version_end=3)
    processed = span("r", generation([1], [5]), sampling=told, policy_version=2, policy_version_end=2)
    plain = span("r", generation([1], [6]), policy_version=2, policy_version_end=2)
    unasked = {**warm, "logprobs_mode": "unknown"}  # the call ended before the engine had said which
    unknown = span("r", generation([1], [7]), sampling=unasked, policy_version=3, policy_version_end=3)
    made, left_out = convert(fresh, stale, mixed, processed, plain, unknown, version=3)
    assert [(list(each.response_ids), each.sampling, each.logprobs_are_raw) for each in made] == [
        ([2], Sampling(0.7), True),
        ([5], Sampling(0.7), False),
        ([6], PLAIN, False),
    ]
    assert left_out.calls == {Reason.UNKNOWN_LOGPROBS: 3}


def test_rows_say_of_each_token_what_it_was_sampled_from() -> None:
    warm = {"temperature": 0.7}
    made, _ = convert(
        span("r", generation([1], [2, 3])), span("r", generation([1, 2, 3, 4], [5, 6]), sampling=warm)
    )
    rows = pack(merge([replace(each, advantage=1.0) for each in made]))
    assert rows.samplings == (PLAIN, Sampling(0.7))
    assert rows.sampling.tolist() == [0, 0, 0, 0, 1, 1]
    assert rows.raw.tolist() == [False, False, False, False, True, True]
    assert rows.as_told().sampling.tolist() == [0] * 6
    completed = rows.with_logprobs(np.arange(6, dtype=np.float32))
    assert completed.logprobs.tolist() == [0, 1, 2, 3, 4, 5]
    assert not completed.raw.any()
