"""openai-python, synchronous in threads: parse() into pydantic models, whole and with the stream helper."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel

client = OpenAI()


class NextStation(BaseModel):
    """Name the station that comes after this one."""

    station: str


class Arrival(BaseModel):
    terminus: str


def next_station(station):
    line, number = station.split("-")
    return f"{line}-{int(number) + 1}"


def ask(messages, stream):
    wanted = {
        "model": "policy",
        "messages": messages,
        "tools": [pydantic_function_tool(NextStation, name="next_station")],
        "response_format": Arrival,
    }
    if not stream:
        return client.chat.completions.parse(**wanted).choices[0].message
    with client.chat.completions.stream(**wanted) as events:
        events.until_done()
        return events.get_final_completion().choices[0].message


def run(line, stream=""):
    called = []
    messages = [{"role": "user", "content": f"Ride from {line}-0 to the terminus."}]
    while True:
        message = ask(messages, stream)
        if not message.tool_calls:
            return {"line": line, "called": called, "answer": message.parsed.terminus}
        messages.append(message)
        for call in message.tool_calls:
            station = call.function.parsed_arguments.station
            called.append(station)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": next_station(station)})


with ThreadPoolExecutor() as pool:
    for result in pool.map(lambda task: run(*task.split(":")), sys.argv[1:]):
        print(json.dumps(result))
