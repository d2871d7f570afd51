"""LangChain: create_agent with ChatOpenAI and a tool."""

import asyncio
import json
import sys

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI


async def run(line, stream=""):
    called, pieces = [], 0

    def next_station(station: str) -> str:
        """Name the station that comes after this one."""
        called.append(station)
        name, number = station.split("-")
        return f"{name}-{int(number) + 1}"

    agent = create_agent(ChatOpenAI(model="policy"), tools=[next_station], system_prompt="You ride trains.")
    task = {"messages": [{"role": "user", "content": f"Ride from {line}-0 to the terminus."}]}
    if not stream:
        state = await agent.ainvoke(task)
        return {"line": line, "called": called, "answer": state["messages"][-1].text}
    async for mode, event in agent.astream(task, stream_mode=["messages", "values"]):
        if mode == "messages":
            pieces += 1
        else:
            state = event
    return {"line": line, "called": called, "answer": state["messages"][-1].text, "pieces": pieces}


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in sys.argv[1:])):
        print(json.dumps(result))


asyncio.run(main())
