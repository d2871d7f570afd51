"""The agents' own environment: their frameworks, and nothing of ours."""

from __future__ import annotations

from pathlib import Path

from conformance.environments import CannotInstall, python_with

__all__ = ["AGENTS", "CannotInstall", "agents_python"]

ENVIRONMENT = Path(__file__).parent / ".venv"
AGENTS = (
    "langgraph>=1",
    "langchain-openai>=1",
    "openai-agents>=0.20",
    "autogen-agentchat>=0.7",
    "autogen-ext[openai]>=0.7",
)


def agents_python() -> str:
    """Its interpreter; the environment is made at the first call, in a minute. Raises ``CannotInstall``."""
    return str(python_with(AGENTS, ENVIRONMENT))
