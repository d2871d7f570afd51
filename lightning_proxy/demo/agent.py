"""An ordinary text-to-SQL agent on the ``openai`` SDK. It knows nothing of lightning-proxy.

    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=any \\
        python agent.py "What is the highest price?" shop.db

It shows the model the tables of an SQLite file, runs the queries that the model asks for through
its one tool, and prints the answer as one line of JSON.
"""

import argparse
import json
import sqlite3
from typing import Any

from openai import OpenAI

MODEL = "tiny-sql"
MAX_CALLS = 3
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "sql",
            "description": "Run a query.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string"}},
                "required": ["query"],
            },
        },
    }
]


def describe_tables(connection: sqlite3.Connection) -> str:
    """Every table with its columns, e.g. ``items(price, stock)``."""
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {name: [row[1] for row in connection.execute(f'PRAGMA table_info("{name}")')] for name in names}
    return "\n".join(f"{name}({', '.join(columns[name])})" for name in names)


def run_query(connection: sqlite3.Connection, query: str) -> str:
    """The rows as text, or what SQLite has against the query."""
    try:
        rows = connection.execute(query).fetchmany(5)
    except (sqlite3.Error, sqlite3.Warning) as error:
        return f"error: {error}"
    return "\n".join(", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in row) for row in rows)


def ask(client: OpenAI, messages: list[Any], temperature: float) -> dict[str, Any]:
    """One streamed call; returns the assistant's message, put together."""
    content = ""
    calls: dict[int, dict[str, str]] = {}
    stream = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        tools=TOOLS,
        stream=True,
        temperature=temperature,
        max_completion_tokens=64,
    )
    for chunk in stream:
        if not chunk.choices:
            continue
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for piece in delta.tool_calls or ():
            call = calls.setdefault(piece.index, {"id": "", "name": "", "arguments": ""})
            call["id"] += piece.id or ""
            if piece.function:
                call["name"] += piece.function.name or ""
                call["arguments"] += piece.function.arguments or ""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in calls.values()
        ]
    return message


def wanted_query(call: dict[str, Any]) -> str | None:
    """The query of a tool call, or None where the model did not write a proper one."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except json.JSONDecodeError:
        return None
    query = arguments.get("query") if isinstance(arguments, dict) else None
    return query if call["function"]["name"] == "sql" and isinstance(query, str) else None


def answer(question: str, connection: sqlite3.Connection, temperature: float) -> str:
    """Let the model query until it answers in words."""
    client = OpenAI()
    messages: list[Any] = [
        {"role": "system", "content": describe_tables(connection)},
        {"role": "user", "content": question},
    ]
    said = ""
    for _ in range(MAX_CALLS):
        message = ask(client, messages, temperature)
        said = message["content"].strip()
        calls = message.get("tool_calls", [])
        queries = [query for call in calls if (query := wanted_query(call)) is not None]
        if not calls or len(queries) < len(calls):
            break
        messages.append(message)
        for call, query in zip(calls, queries, strict=True):
            result = run_query(connection, query)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a question about an SQLite file.")
    parser.add_argument("question")
    parser.add_argument("db")
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    connection = sqlite3.connect(f"file:{args.db}?mode=ro", uri=True)
    print(json.dumps({"answer": answer(args.question, connection, args.temperature)}))


if __name__ == "__main__":
    main()
