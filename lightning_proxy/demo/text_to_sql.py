"""The demo: one agent, one tool, questions about small databases."""

from __future__ import annotations

from pathlib import Path

from lightning_proxy.demo.tasks import make_tasks
from lightning_proxy.experiment.definition import Experiment

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
