"""OpenAI Agents SDK: an agent with a tool. The first argument is the API: chat_completions or responses."""

import asyncio
import json
import sys

from agents import Agent, Runner, function_tool, set_default_openai_api

api, *tasks = sys.argv[1:]
set_default_openai_api(api)


async def run(line, stream=""):
    called, pieces = [], 0

    @function_tool
    def next_station(station: str) -> str:
        """Name the station that comes after this one."""
        called.append(station)
        name, number = station.split("-")
        return f"{name}-{int(number) + 1}"

    agent = Agent(name="rider", instructions="You ride trains.", model="policy", tools=[next_station])
    task = f"Ride from {line}-0 to the terminus."
    if stream:
        result = Runner.run_streamed(agent, task)
        async for event in result.stream_events():
            pieces += event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    else:
        result = await Runner.run(agent, task)
    return {"line": line, "called": called, "answer": result.final_output, "pieces": pieces}


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in tasks)):
        print(json.dumps(result))


asyncio.run(main())
