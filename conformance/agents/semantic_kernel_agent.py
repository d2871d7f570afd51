"""Semantic Kernel: a ChatCompletionAgent with a plugin."""

import asyncio
import json
import sys
from typing import Annotated

from openai import AsyncOpenAI
from semantic_kernel.agents import ChatCompletionAgent
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion
from semantic_kernel.functions import kernel_function


class Trains:
    def __init__(self):
        self.called = []

    @kernel_function(name="next_station", description="Name the station that comes after this one.")
    def next_station(self, station: Annotated[str, "Where you are"]) -> str:
        self.called.append(station)
        line, number = station.split("-")
        return f"{line}-{int(number) + 1}"


async def run(line, stream=""):
    trains, pieces = Trains(), 0
    agent = ChatCompletionAgent(
        service=OpenAIChatCompletion(ai_model_id="policy", async_client=AsyncOpenAI()),
        name="rider",
        instructions="You ride trains.",
        plugins=[trains],
    )
    task = f"Ride from {line}-0 to the terminus."
    if stream:
        answer = ""
        async for piece in agent.invoke_stream(messages=task):
            answer += str(piece.message)
            pieces += 1
    else:
        answer = str((await agent.get_response(messages=task)).message)
    return {"line": line, "called": trains.called, "answer": answer, "pieces": pieces}


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in sys.argv[1:])):
        print(json.dumps(result))


asyncio.run(main())
