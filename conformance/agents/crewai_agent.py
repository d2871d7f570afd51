"""CrewAI: a crew of one agent with a tool, one crew to a thread."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool


def run(line, stream=""):
    called = []

    @tool("next_station")
    def next_station(station: str) -> str:
        """Name the station that comes after this one."""
        called.append(station)
        name, number = station.split("-")
        return f"{name}-{int(number) + 1}"

    rider = Agent(
        role="rider",
        goal="Reach the terminus",
        backstory="You ride trains.",
        tools=[next_station],
        llm=LLM(model="policy", provider="openai", stream=bool(stream)),
    )
    task = Task(
        description=f"Ride from {line}-0 to the terminus.", expected_output="The terminus.", agent=rider
    )
    answer = Crew(agents=[rider], tasks=[task]).kickoff().raw
    return {"line": line, "called": called, "answer": answer}


with ThreadPoolExecutor() as pool:
    for result in pool.map(lambda task: run(*task.split(":")), sys.argv[1:]):
        print(json.dumps(result))
