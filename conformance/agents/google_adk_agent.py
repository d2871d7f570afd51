"""Google ADK: an LlmAgent with a tool, its model through LiteLlm."""

import asyncio
import json
import sys

from google.adk.agents import LlmAgent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.models.lite_llm import LiteLlm
from google.adk.runners import InMemoryRunner
from google.genai import types


async def run(line, stream=""):
    called, pieces, answer = [], 0, ""

    def next_station(station: str) -> str:
        """Name the station that comes after this one."""
        called.append(station)
        name, number = station.split("-")
        return f"{name}-{int(number) + 1}"

    agent = LlmAgent(
        name="rider",
        model=LiteLlm(model="openai/policy"),
        instruction="You ride trains.",
        tools=[next_station],
    )
    runner = InMemoryRunner(agent=agent, app_name="trains")
    session = await runner.session_service.create_session(app_name="trains", user_id="rider")
    task = types.Content(role="user", parts=[types.Part(text=f"Ride from {line}-0 to the terminus.")])
    config = RunConfig(streaming_mode=StreamingMode.SSE if stream else StreamingMode.NONE)
    async for event in runner.run_async(
        user_id="rider", session_id=session.id, new_message=task, run_config=config
    ):
        pieces += bool(event.partial)
        if event.is_final_response() and event.content:
            answer = "".join(part.text or "" for part in event.content.parts)
    return {"line": line, "called": called, "answer": answer, "pieces": pieces}


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in sys.argv[1:])):
        print(json.dumps(result))


asyncio.run(main())
