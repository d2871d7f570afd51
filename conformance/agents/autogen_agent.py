"""AutoGen: an AssistantAgent with a tool."""

import asyncio
import json
import sys

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ModelClientStreamingChunkEvent
from autogen_ext.models.openai import OpenAIChatCompletionClient

FACTS = {
    "function_calling": True,
    "json_output": True,
    "vision": False,
    "structured_output": True,
    "family": "unknown",
}


async def run(line, stream=""):
    called, pieces = [], 0

    async def next_station(station: str) -> str:
        """Name the station that comes after this one."""
        called.append(station)
        name, number = station.split("-")
        return f"{name}-{int(number) + 1}"

    agent = AssistantAgent(
        "rider",
        OpenAIChatCompletionClient(model="policy", model_info=FACTS),
        tools=[next_station],
        system_message="You ride trains.",
        model_client_stream=bool(stream),
        max_tool_iterations=5,
    )
    async for event in agent.run_stream(task=f"Ride from {line}-0 to the terminus."):
        pieces += isinstance(event, ModelClientStreamingChunkEvent)
    return {"line": line, "called": called, "answer": event.messages[-1].content, "pieces": pieces}


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in sys.argv[1:])):
        print(json.dumps(result))


asyncio.run(main())
