"""A question-answering agent on the OpenAI Agents SDK, with a search tool over a file of facts.

    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=any \\
        python agent.py "In which city does the boss of Anna live?" facts.txt

It knows nothing of lightning-proxy. It prints its answer as a line of JSON.
"""

import argparse
import asyncio
import json
import re
from itertools import pairwise
from pathlib import Path

import prompts
from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_api, set_tracing_disabled
from agents.exceptions import MaxTurnsExceeded, ModelBehaviorError

MODEL = "policy"
MAX_TURNS = 4


def neighbours(text: str) -> set[tuple[str, str]]:
    """The pairs of words that stand next to each other, in lower case."""
    return set(pairwise(re.findall(r"\w+", text.lower())))


class Facts:
    """One fact a line; found by how many neighbouring words it shares with a query."""

    def __init__(self, path: Path) -> None:
        self._facts = [(line, neighbours(line)) for line in path.read_text(encoding="utf-8").splitlines()]

    def search(self, query: str) -> str:
        """The best fact; among equals the first."""
        wanted = neighbours(query)
        best, shared = max(
            ((line, len(wanted & its)) for line, its in self._facts), key=lambda found: found[1]
        )
        return best if shared > 1 else "nothing found"


async def answer(question: str, facts: Facts, temperature: float) -> str:
    """Let the model search until it answers in words."""

    @function_tool(name_override=prompts.TOOL, description_override=prompts.TOOL_DESCRIPTION)
    def search(query: str) -> str:
        return facts.search(query)

    agent = Agent(
        name="researcher",
        instructions=prompts.INSTRUCTIONS,
        model=MODEL,
        model_settings=ModelSettings(temperature=temperature, max_tokens=64),
        tools=[search],
    )
    try:
        result = await Runner.run(agent, question, max_turns=MAX_TURNS)
    except (MaxTurnsExceeded, ModelBehaviorError):
        return ""
    return str(result.final_output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a question from a file of facts.")
    parser.add_argument("question")
    parser.add_argument("facts", type=Path)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    set_default_openai_api("chat_completions")
    set_tracing_disabled(True)
    print(json.dumps({"answer": asyncio.run(answer(args.question, Facts(args.facts), args.temperature))}))


if __name__ == "__main__":
    main()
