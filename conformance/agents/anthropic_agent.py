"""anthropic-python: Messages, whole and with the stream helper."""

import asyncio
import json
import sys

from anthropic import AsyncAnthropic

client = AsyncAnthropic()
TOOL = {
    "name": "next_station",
    "description": "Name the station that comes after this one.",
    "input_schema": {
        "type": "object",
        "properties": {"station": {"type": "string"}},
        "required": ["station"],
    },
}


def next_station(station):
    line, number = station.split("-")
    return f"{line}-{int(number) + 1}"


async def ask(messages, stream):
    wanted = {"model": "policy", "max_tokens": 500, "system": "You ride trains.", "tools": [TOOL]}
    if not stream:
        return await client.messages.create(messages=messages, **wanted), 0
    pieces = 0
    async with client.messages.stream(messages=messages, **wanted) as events:
        async for _ in events.text_stream:
            pieces += 1
        return await events.get_final_message(), pieces


async def run(line, stream=""):
    called, pieces = [], 0
    messages = [{"role": "user", "content": f"Ride from {line}-0 to the terminus."}]
    while True:
        answer, more = await ask(messages, stream)
        pieces += more
        uses = [block for block in answer.content if block.type == "tool_use"]
        if not uses:
            text = "".join(block.text for block in answer.content if block.type == "text")
            return {"line": line, "called": called, "answer": text, "pieces": pieces}
        messages.append({"role": "assistant", "content": answer.content})
        results = []
        for use in uses:
            called.append(use.input["station"])
            result = next_station(use.input["station"])
            results.append({"type": "tool_result", "tool_use_id": use.id, "content": result})
        messages.append({"role": "user", "content": results})


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in sys.argv[1:])):
        print(json.dumps(result))


asyncio.run(main())
