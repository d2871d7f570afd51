"""LangGraph: a graph of a model node and a tool node, written out."""

import asyncio
import json
import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition


@tool
def next_station(station: str) -> str:
    """Name the station that comes after this one."""
    line, number = station.split("-")
    return f"{line}-{int(number) + 1}"


model = ChatOpenAI(model="policy").bind_tools([next_station])


async def think(state: MessagesState):
    return {"messages": [await model.ainvoke(state["messages"])]}


builder = StateGraph(MessagesState)
builder.add_node("think", think)
builder.add_node("tools", ToolNode([next_station]))
builder.add_edge(START, "think")
builder.add_conditional_edges("think", tools_condition)
builder.add_edge("tools", "think")
graph = builder.compile()


async def run(line, stream=""):
    pieces, task = 0, {"messages": [("user", f"Ride from {line}-0 to the terminus.")]}
    if stream:
        async for mode, event in graph.astream(task, stream_mode=["messages", "values"]):
            if mode == "messages":
                pieces += 1
            else:
                state = event
    else:
        state = await graph.ainvoke(task)
    called = [
        call["args"]["station"]
        for message in state["messages"]
        for call in getattr(message, "tool_calls", [])
    ]
    return {"line": line, "called": called, "answer": state["messages"][-1].text, "pieces": pieces}


async def main():
    for result in await asyncio.gather(*(run(*task.split(":")) for task in sys.argv[1:])):
        print(json.dumps(result))


asyncio.run(main())
