"""openai-python: Responses, whole and with the stream helper; the whole history is sent each time."""

import asyncio
import json
import sys

from openai import AsyncOpenAI

client = AsyncOpenAI()
TOOL = {
    "type": "function",
    "name": "next_station",
    "description": "Name the station that comes after this one.",
    "parameters": {"type": "object", "properties": {"station": {"type": "string"}}, "required": ["station"]},
}


def next_station(station):
    line, number = station.split("-")
    return f"{line}-{int(number) + 1}"


async def ask(history, stream):
    if not stream:
        return await client.responses.create(model="policy", input=history, tools=[TOOL]), 0
    pieces = 0
    async with client.responses.stream(model="policy", input=history, tools=[TOOL]) as events:
        async for event in events:
            pieces += event.type == "response.output_text.delta"
        return await events.get_final_response(), pieces


async def run(line, stream=""):
    called, pieces = [], 0
    history = [{"role": "user", "content": f"Ride from {line}-0 to the terminus."}]
    while True:
        response, more = await ask(history, stream)
        pieces += more
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return {"line": line, "called": called, "answer": response.output_text, "pieces": pieces}
        history += response.output
        for call in calls:
            station = json.loads(call.arguments)["station"]
            called.append(station)
            output = {
                "type": "function_call_output",
                "call_id": call.call_id,
                "output": next_station(station),
            }
            history.append(output)


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in sys.argv[1:])):
        print(json.dumps(result))


asyncio.run(main())
