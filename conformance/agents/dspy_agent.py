"""DSPy: a ReAct program, which writes its tool calls as text."""

import asyncio
import json
import sys

import dspy

dspy.configure(lm=dspy.LM("openai/policy", cache=False))


async def run(line):
    called = []

    def next_station(station: str) -> str:
        """Name the station that comes after this one."""
        called.append(station)
        name, number = station.split("-")
        return f"{name}-{int(number) + 1}"

    program = dspy.ReAct("task -> answer", tools=[next_station])
    prediction = await program.acall(task=f"Ride from {line}-0 to the terminus.")
    return {"line": line, "called": called, "answer": prediction.answer}


async def main():
    for result in await asyncio.gather(*(run(task) for task in sys.argv[1:])):
        print(json.dumps(result))


asyncio.run(main())
