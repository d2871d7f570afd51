"""The demo: one agent, one tool, questions about small databases."""

from __future__ import annotations

from pathlib import Path

from lightning_proxy.demo.loop import Experiment
from lightning_proxy.demo.tasks import make_tasks

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"

TEXT_TO_SQL = Experiment(
    title="text-to-SQL agent",
    policy="tiny-sql",
    model=WEIGHTS,
    agent=HERE / "agent.py",
    make_tasks=make_tasks,
    stop_at=0.9,
)
