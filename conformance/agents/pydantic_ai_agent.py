"""Pydantic AI: an agent with a tool. The first argument is the model's name, with its API."""

import asyncio
import json
import sys

from pydantic_ai import Agent

model, *tasks = sys.argv[1:]


async def run(line, stream=""):
    called, pieces = [], 0
    agent = Agent(model, instructions="You ride trains.")

    @agent.tool_plain
    def next_station(station: str) -> str:
        """Name the station that comes after this one."""
        called.append(station)
        name, number = station.split("-")
        return f"{name}-{int(number) + 1}"

    task = f"Ride from {line}-0 to the terminus."
    if not stream:
        result = await agent.run(task)
        return {"line": line, "called": called, "answer": result.output}
    async with agent.iter(task) as nodes:
        async for node in nodes:
            if Agent.is_model_request_node(node):
                async with node.stream(nodes.ctx) as events:
                    async for _ in events:
                        pieces += 1
    return {"line": line, "called": called, "answer": nodes.result.output, "pieces": pieces}


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in tasks)):
        print(json.dumps(result))


asyncio.run(main())
