"""Microsoft Agent Framework: an agent with a tool. The first argument is the API: chat or responses."""

import asyncio
import json
import sys

from agent_framework import Agent
from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient

api, *tasks = sys.argv[1:]
Client = OpenAIChatClient if api == "responses" else OpenAIChatCompletionClient


async def run(line, stream=""):
    called, pieces = [], 0

    def next_station(station: str) -> str:
        """Name the station that comes after this one."""
        called.append(station)
        name, number = station.split("-")
        return f"{name}-{int(number) + 1}"

    agent = Agent(client=Client(model="policy"), instructions="You ride trains.", tools=[next_station])
    task = f"Ride from {line}-0 to the terminus."
    if stream:
        answer = ""
        async for update in agent.run(task, stream=True):
            answer += update.text or ""
            pieces += 1
    else:
        answer = (await agent.run(task)).text
    return {"line": line, "called": called, "answer": answer, "pieces": pieces}


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in tasks)):
        print(json.dumps(result))


asyncio.run(main())
