"""LlamaIndex: a FunctionAgent with a tool."""

import asyncio
import json
import sys

from llama_index.core.agent.workflow import AgentStream, FunctionAgent
from llama_index.llms.openai import OpenAI


class Policy(OpenAI):
    """The library looks a model's facts up by its name, and knows OpenAI's names only."""

    @property
    def metadata(self):
        return OpenAI(model="gpt-4o").metadata


async def run(line, stream=""):
    called, pieces = [], 0

    def next_station(station: str) -> str:
        """Name the station that comes after this one."""
        called.append(station)
        name, number = station.split("-")
        return f"{name}-{int(number) + 1}"

    agent = FunctionAgent(
        tools=[next_station],
        llm=Policy(model="policy"),
        system_prompt="You ride trains.",
        streaming=bool(stream),
    )
    handler = agent.run(f"Ride from {line}-0 to the terminus.")
    async for event in handler.stream_events():
        pieces += isinstance(event, AgentStream)
    return {"line": line, "called": called, "answer": str(await handler), "pieces": pieces}


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in sys.argv[1:])):
        print(json.dumps(result))


asyncio.run(main())
