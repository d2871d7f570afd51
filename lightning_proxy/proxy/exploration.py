"""Exploration: some rollouts are sampled at a temperature of ours instead of the agent's. No I/O.

Many agents run at temperature 0. Then all rollouts of a task are alike, and there is nothing to compare
them by. Off unless ``[[exploration]]`` asks for it: this is the one way in which an agent gets another
answer through us than without us.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from lightning_proxy.config.settings import ExplorationSettings

from .wires.base import Json
from .wires.choices import with_fields

EXPLORED = "explored"  # key of a span's sampling parameters: the temperature is ours


class Exploration:
    """Which rollouts explore, and how."""

    def __init__(self, settings: Sequence[ExplorationSettings] = ()) -> None:
        self._settings = tuple(settings)

    def temperature(self, rollout_id: str, role: str | None) -> float | None:
        """The temperature of a rollout's calls in this role; ``None`` where the agent's stays.

        The rollout's id decides, so that all its calls explore or none does, in every process.
        """
        for each in self._settings:
            if each.role in (None, role):
                return each.temperature if _place(rollout_id) < each.share else None
        return None


def explored(body: bytes, request: Json, temperature: float) -> tuple[bytes, Json]:
    """A request, as text and parsed, at another temperature."""
    changes = {"temperature": temperature}
    return with_fields(body, request, changes), {**request, **changes}


def _place(rollout_id: str) -> float:
    """A number from 0 to 1 (exclusive), as good as random and always the same for an id."""
    digest = hashlib.sha256(rollout_id.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
