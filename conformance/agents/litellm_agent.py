"""litellm's SDK: acompletion with a tool, whole and streamed."""

import asyncio
import json
import sys

from litellm import acompletion, stream_chunk_builder

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
    answer = await acompletion(model="openai/policy", messages=messages, tools=[TOOL], stream=bool(stream))
    if not stream:
        return answer.choices[0].message, 0
    chunks = [chunk async for chunk in answer]
    return stream_chunk_builder(chunks, messages=messages).choices[0].message, len(chunks)


async def run(line, stream=""):
    called, pieces = [], 0
    messages = [{"role": "user", "content": f"Ride from {line}-0 to the terminus."}]
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
