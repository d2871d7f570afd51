"""A maths agent in AutoGen, with a calculator for its tool.

    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=any \\
        python agent.py "Anna has 12 pens, finds 5, and loses 3. How many are there?"

It knows nothing of lightning-proxy. It prints its answer as a line of JSON.
"""

import argparse
import asyncio
import json

import prompts
from autogen_agentchat.agents import AssistantAgent
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from sums import calculator

MODEL = "policy"
MAX_TOOL_ITERATIONS = 3
FACTS = {
    "function_calling": True,
    "json_output": True,
    "vision": False,
    "structured_output": True,
    "family": "unknown",
}


async def answer(question: str, temperature: float) -> str:
    """Let the model calculate until it answers in words."""
    client = OpenAIChatCompletionClient(model=MODEL, model_info=FACTS, temperature=temperature, max_tokens=64)
    agent = AssistantAgent(
        "calculating",
        client,
        tools=[FunctionTool(calculator, prompts.TOOL_DESCRIPTION, name=prompts.TOOL)],
        system_message=prompts.SYSTEM,
        max_tool_iterations=MAX_TOOL_ITERATIONS,
    )
    result = await agent.run(task=question)
    return result.messages[-1].to_text()


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a word problem.")
    parser.add_argument("question")
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    print(json.dumps({"answer": asyncio.run(answer(args.question, args.temperature))}))


if __name__ == "__main__":
    main()
