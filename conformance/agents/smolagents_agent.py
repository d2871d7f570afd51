"""smolagents: a ToolCallingAgent, one to a thread. The model answers by the tool final_answer."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from smolagents import OpenAIServerModel, ToolCallingAgent, tool


def run(line, stream=""):
    called = []

    @tool
    def next_station(station: str) -> str:
        """Name the station that comes after this one.

        Args:
            station: Where you are.
        """
        called.append(station)
        name, number = station.split("-")
        return f"{name}-{int(number) + 1}"

    agent = ToolCallingAgent(
        tools=[next_station],
        model=OpenAIServerModel("policy", api_key=os.environ["OPENAI_API_KEY"]),
        stream_outputs=bool(stream),
        verbosity_level=0,
    )
    return {"line": line, "called": called, "answer": agent.run(f"Ride from {line}-0 to the terminus.")}


with ThreadPoolExecutor() as pool:
    for result in pool.map(lambda task: run(*task.split(":")), sys.argv[1:]):
        print(json.dumps(result))
