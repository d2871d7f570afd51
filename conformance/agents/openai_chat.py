"""openai-python: Chat Completions, whole and with the stream helper."""

import asyncio
import json
import sys

from openai import AsyncOpenAI

client = AsyncOpenAI()
TOOL = {
    "type": "function",
    "function": {
        "name": "next_station",
        "description": "Name the station that comes after this one.",
        "parameters": {
            "type": "object",
            "properties": {"station": {"type": "string"}},
            "required": ["station"],
        },
    },
}


def next_station(station):
    line, number = station.split("-")
    return f"{line}-{int(number) + 1}"


async def ask(messages, stream):
    if not stream:
        answer = await client.chat.completions.create(model="policy", messages=messages, tools=[TOOL])
        return answer.choices[0].message, 0
    pieces = 0
    async with client.chat.completions.stream(model="policy", messages=messages, tools=[TOOL]) as events:
        async for event in events:
            pieces += event.type == "content.delta"
        return (await events.get_final_completion()).choices[0].message, pieces


async def run(line, stream=""):
    called, pieces = [], 0
    messages = [
        {"role": "system", "content": "You ride trains."},
        {"role": "user", "content": f"Ride from {line}-0 to the terminus."},
    ]
    while True:
        message, more = await ask(messages, stream)
        pieces += more
        if not message.tool_calls:
            return {"line": line, "called": called, "answer": message.content, "pieces": pieces}
        messages.append(message)
        for call in message.tool_calls:
            station = json.loads(call.function.arguments)["station"]
            called.append(station)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": next_station(station)})


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in sys.argv[1:])):
        print(json.dumps(result))


asyncio.run(main())
