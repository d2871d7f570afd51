"""The maths agent as a service, on the plain ``openai`` SDK: one process that many users ask at once.

    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=any python service.py

A question is a line of JSON on stdin, ``{"id", "question"}``; its answer is one on stdout, ``{"id", "answer",
"response_id"}``, the last being the ``id`` of the model's own answer. It knows nothing of lightning-proxy.
"""

import asyncio
import json
import sys
from typing import Any

import prompts
from openai import AsyncOpenAI, OpenAIError
from sums import calculator

MODEL = "policy"
MAX_CALLS = 3
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": prompts.TOOL,
            "description": prompts.TOOL_DESCRIPTION,
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
        },
    }
]


async def answer(client: AsyncOpenAI, question: str) -> dict[str, Any]:
    """Let the model calculate until it answers in words."""
    messages: list[Any] = [
        {"role": "system", "content": prompts.SYSTEM},
        {"role": "user", "content": question},
    ]
    for _ in range(MAX_CALLS):
        response = await client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS, max_tokens=64
        )
        message = response.choices[0].message
        if not message.tool_calls:
            return {"answer": message.content, "response_id": response.id}
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = calculate(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return {"answer": None, "response_id": response.id}


def calculate(arguments: str) -> str:
    """What the model asks the calculator for; an error is told to the model."""
    try:
        return calculator(json.loads(arguments)["expression"])
    except (ValueError, TypeError, KeyError):
        return "error: no expression"


async def serve() -> None:
    """Answer until stdin ends; each question by itself."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with AsyncOpenAI() as client, asyncio.TaskGroup() as asked:

        async def reply(job: dict[str, Any]) -> None:
            try:
                said = await answer(client, job["question"])
            except OpenAIError as error:
                said = {"answer": None, "response_id": None, "error": str(error)}
            print(json.dumps({"id": job["id"], **said}), flush=True)

        async for line in lines:
            asked.create_task(reply(json.loads(line)))


if __name__ == "__main__":
    asyncio.run(serve())
