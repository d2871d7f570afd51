"""The table of clients: what to install, what to run, what to expect of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from conformance.replies import CLAUDE_CODE, CODEX, DSPY, PARSED, SMOLAGENTS, Replies

AGENTS = Path(__file__).parent / "agents"


@dataclass(frozen=True, slots=True)
class Client:
    """One client."""

    name: str
    package: str  # the one whose version counts
    agent: str  # a file in agents/; for npm a folder with package.json and agent.mjs
    api: str  # what of the package the agent uses
    wire: str = "chat"
    fidelity: Literal["exact", "text", "none"] = "exact"  # of each span, at least; none: there are no spans
    streams: Literal["both", "always", "never"] = "both"
    core: bool = False  # runs in CI
    registry: Literal["pypi", "npm"] = "pypi"
    requires: tuple[str, ...] = ()  # what pip installs, where that is not just the package
    env: str = ""  # the environment, where it is not the client's own
    arguments: tuple[str, ...] = ()  # before the tasks
    variables: Mapping[str, str] = field(default_factory=dict)  # beside the standard ones
    replies: Replies = ()  # of the model, tried before the common ones
    timeout_s: float = 120.0
    note: str = ""  # what its user has to know


# One environment for all that CI needs: pip resolves and installs it in less than a minute.
_CORE = (
    "openai",
    "openai-agents",
    "anthropic",
    "langchain",
    "langchain-openai",
    "langgraph",
    "pydantic-ai-slim[openai]",
)
_NO_PRICE_LIST = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # litellm fetches it from the network otherwise
_NO_TRACES = {"OPENAI_AGENTS_DISABLE_TRACING": "1"}  # the agents SDK sends them to OpenAI otherwise
_NO_TELEMETRY = {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "OTEL_SDK_DISABLED": "true",
}

_in_core = partial(Client, requires=_CORE, env="core")
_npm = partial(Client, registry="npm")

CLIENTS: tuple[Client, ...] = (
    _in_core("openai", "openai", "openai_chat.py", "chat.completions: create, stream helper", core=True),
    _in_core(
        "openai-parse",
        "openai",
        "openai_parse.py",
        "chat.completions, synchronous: parse, stream helper",
        replies=PARSED,
        core=True,
    ),
    _in_core("openai-responses", "openai", "openai_responses.py", "responses: create, stream", "responses"),
    _in_core(
        "openai-agents",
        "openai-agents",
        "openai_agents.py",
        "Runner, chat_completions",
        arguments=("chat_completions",),
        variables=_NO_TRACES,
        core=True,
    ),
    _in_core(
        "openai-agents-responses",
        "openai-agents",
        "openai_agents.py",
        "Runner, responses (its default)",
        "responses",
        arguments=("responses",),
        variables=_NO_TRACES,
    ),
    _in_core("langchain", "langchain", "langchain_agent.py", "create_agent, ChatOpenAI"),
    _in_core("langgraph", "langgraph", "langgraph_agent.py", "StateGraph, ToolNode, ChatOpenAI", core=True),
    _in_core(
        "anthropic",
        "anthropic",
        "anthropic_agent.py",
        "messages: create, stream helper",
        "messages",
        core=True,
    ),
    _in_core(
        "pydantic-ai",
        "pydantic-ai-slim",
        "pydantic_ai_agent.py",
        "Agent, openai-chat:",
        arguments=("openai-chat:policy",),
        core=True,
    ),
    _in_core(
        "pydantic-ai-responses",
        "pydantic-ai-slim",
        "pydantic_ai_agent.py",
        "Agent, openai: (its default)",
        "responses",
        arguments=("openai:policy",),
    ),
    Client(
        "autogen",
        "autogen-agentchat",
        "autogen_agent.py",
        "AssistantAgent, OpenAIChatCompletionClient",
        requires=("autogen-agentchat", "autogen-ext[openai]"),
        note="a model that is not OpenAI's needs `model_info`",
    ),
    Client(
        "crewai",
        "crewai",
        "crewai_agent.py",
        "Crew, Agent, Task",
        variables=_NO_TELEMETRY,
        note='`LLM(model=..., provider="openai")`: by the name alone it looks for litellm',
    ),
    Client("semantic-kernel", "semantic-kernel", "semantic_kernel_agent.py", "ChatCompletionAgent"),
    Client(
        "agent-framework",
        "agent-framework-core",
        "agent_framework_agent.py",
        "Agent, OpenAIChatClient",
        "responses",
        requires=("agent-framework-core", "agent-framework-openai"),
        arguments=("responses",),
    ),
    Client(
        "agent-framework-chat",
        "agent-framework-core",
        "agent_framework_agent.py",
        "Agent, OpenAIChatCompletionClient",
        requires=("agent-framework-core", "agent-framework-openai"),
        env="agent-framework",
        arguments=("chat",),
    ),
    Client("dspy", "dspy", "dspy_agent.py", "ReAct", streams="never", variables=_NO_PRICE_LIST, replies=DSPY),
    Client(
        "llama-index",
        "llama-index-core",
        "llama_index_agent.py",
        "FunctionAgent, OpenAI",
        requires=("llama-index-core", "llama-index-llms-openai"),
        variables={"OPENAI_API_BASE": "{root}/v1"},
        note="it reads no `OPENAI_BASE_URL`, and knows the facts of OpenAI's models only",
    ),
    Client(
        "smolagents",
        "smolagents",
        "smolagents_agent.py",
        "ToolCallingAgent, OpenAIServerModel",
        requires=("smolagents[openai]",),
        replies=SMOLAGENTS,
    ),
    Client(
        "google-adk",
        "google-adk",
        "google_adk_agent.py",
        "LlmAgent, LiteLlm",
        requires=("google-adk", "litellm", "mcp"),
        variables=_NO_PRICE_LIST,
        note="litellm imports `mcp` for a call with tools, and does not declare it",
    ),
    Client(
        "litellm",
        "litellm",
        "litellm_agent.py",
        "acompletion",
        requires=("litellm", "mcp"),
        variables=_NO_PRICE_LIST,
        note="it imports `mcp` for a call with tools, and does not declare it",
    ),
    _npm("openai-node", "openai", "openai_node", "chat.completions: create, stream helper"),
    _npm("vercel-ai", "ai", "vercel_ai", "generateText, streamText, openai.chat()", arguments=("chat",)),
    _npm(
        "vercel-ai-responses",
        "ai",
        "vercel_ai",
        "generateText, streamText, openai() (its default)",
        "responses",
        env="vercel-ai",
        arguments=("responses",),
        note="`store: false`, or it refers to items that vLLM does not keep",
    ),
    _npm(
        "openai-agents-js",
        "@openai/agents",
        "openai_agents_js",
        "run, chat_completions",
        arguments=("chat_completions",),
    ),
    _npm(
        "openai-agents-js-responses",
        "@openai/agents",
        "openai_agents_js",
        "run, responses (its default)",
        "responses",
        streams="never",
        env="openai-agents-js",
        arguments=("responses",),
        note="streamed, 0.20.0 refuses the lists in vLLM's `usage`, with the proxy and without",
    ),
    _npm(
        "codex",
        "@openai/codex",
        "codex",
        "codex exec, its shell",
        "responses",
        streams="always",
        variables={"CODEX_API_KEY": "any"},
        note='`--config openai_base_url="..."` in place of the variable',
        replies=CODEX,
    ),
    _npm(
        "claude-code",
        "@anthropic-ai/claude-code",
        "claude_code",
        "claude --print, its Bash",
        "messages",
        "exact",
        streams="always",
        variables={"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"},
        replies=CLAUDE_CODE,
    ),
)
