"""A text-to-SQL agent of three roles in LangGraph: one writes, one checks, one rewrites.

    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=any \\
        python agent.py "What is the highest price of the items?" shop.db

It knows nothing of lightning-proxy. It prints the value that its last query gives, as a line of JSON.
"""

import argparse
import json
import sqlite3
from typing import TypedDict

import prompts
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

MODEL = "policy"
MAX_REWRITES = 2


class State(TypedDict, total=False):
    """What the roles hand on to one another."""

    tables: str
    question: str
    query: str
    result: str
    verdict: str
    rewrites: int


def describe_tables(connection: sqlite3.Connection) -> str:
    """Every table with its columns, e.g. ``items(price, stock)``."""
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {name: [row[1] for row in connection.execute(f'PRAGMA table_info("{name}")')] for name in names}
    return "\n".join(f"{name}({', '.join(columns[name])})" for name in names)


def run_query(connection: sqlite3.Connection, query: str) -> str:
    """The first value, or what SQLite has against the query."""
    try:
        row = connection.execute(query).fetchone()
    except (sqlite3.Error, sqlite3.Warning) as error:
        return f"error: {error}"
    return "nothing" if row is None else f"{row[0]:g}" if isinstance(row[0], float) else str(row[0])


def build_graph(connection: sqlite3.Connection, model: ChatOpenAI):
    """write -> execute -> check, then the end, or rewrite -> execute -> check again."""

    def write(state: State) -> State:
        return {"query": model.invoke(prompts.writer(state["tables"], state["question"])).text, "rewrites": 0}

    def execute(state: State) -> State:
        return {"result": run_query(connection, state["query"])}

    def check(state: State) -> State:
        asked = prompts.checker(state["tables"], state["question"], state["query"], state["result"])
        return {"verdict": model.invoke(asked).text}

    def rewrite(state: State) -> State:
        asked = prompts.rewriter(state["tables"], state["question"], state["query"], state["result"])
        return {"query": model.invoke(asked).text, "rewrites": state["rewrites"] + 1}

    def is_done(state: State) -> str:
        done = state["verdict"].strip() == prompts.APPROVED or state["rewrites"] >= MAX_REWRITES
        return END if done else "rewrite"

    builder = StateGraph(State)
    for node in (write, execute, check, rewrite):
        builder.add_node(node.__name__, node)
    builder.add_edge(START, "write")
    builder.add_edge("write", "execute")
    builder.add_edge("execute", "check")
    builder.add_conditional_edges("check", is_done, [END, "rewrite"])
    builder.add_edge("rewrite", "execute")
    return builder.compile()


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a question about an SQLite file.")
    parser.add_argument("question")
    parser.add_argument("db")
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    connection = sqlite3.connect(f"file:{args.db}?mode=ro", uri=True, check_same_thread=False)
    model = ChatOpenAI(model=MODEL, temperature=args.temperature, max_completion_tokens=64)
    asked: State = {"tables": describe_tables(connection), "question": args.question}
    print(json.dumps({"answer": build_graph(connection, model).invoke(asked)["result"]}))


if __name__ == "__main__":
    main()
