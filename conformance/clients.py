"""The table of clients: what to install, what to run, what to expect of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from conformance.replies import DSPY, PARSED, SMOLAGENTS, Replies

AGENTS = Path(__file__).parent / "agents"


@dataclass(frozen=True, slots=True)
class Client:
    """One client."""

    name: str
    package: str  # the one whose version counts
    agent: str  # a file in agents/; for npm a folder with package.json and agent.mjs
    api: str  # what of the package the agent uses
    wire: str = "chat"
    fidelity: Literal["exact", "none"] = "exact"  # of each span; none: forwarded unread, so no spans
    streams: bool = True
    core: bool = False  # runs in CI
    registry: Literal["pypi", "npm"] = "pypi"
    requires: tuple[str, ...] = ()  # what pip installs, where that is not just the package
    env: str = ""  # the environment, where it is not the client's own
    arguments: tuple[str, ...] = ()  # before the tasks
    variables: Mapping[str, str] = field(default_factory=dict)  # beside the standard ones
    replies: Replies = ()  # of the model, tried before the common ones
    timeout_s: float = 180.0


# One environment for all that CI needs: pip resolves and installs it in half a minute.
_CORE = (
    "openai",
    "openai-agents",
    "anthropic",
    "langchain",
    "langchain-openai",
    "langgraph",
    "pydantic-ai-slim[openai]",
)
_NO_PRICE_LIST = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # it is fetched from the network otherwise
_NO_TRACES = {"OPENAI_AGENTS_DISABLE_TRACING": "1"}  # they go to OpenAI otherwise
_NO_TELEMETRY = {"CREWAI_DISABLE_TELEMETRY": "true", "CREWAI_TRACING_ENABLED": "false", "OTEL_SDK_DISABLED": "true"}


def _in_core(name: str, package: str, agent: str, api: str, wire: str = "chat", *, core: bool = False,
             fidelity: Literal["exact", "none"] = "exact", arguments: tuple[str, ...] = (),
             variables: Mapping[str, str] | None = None, replies: Replies = ()) -> Client:  # fmt: skip
    return Client(
        name, package, agent, api, wire, fidelity, core=core, requires=_CORE, env="core",
        arguments=arguments, variables=variables or {}, replies=replies,
    )  # fmt: skip


CLIENTS: tuple[Client, ...] = (
    _in_core("openai", "openai", "openai_chat.py", "chat.completions create, stream helper", core=True),
    _in_core("openai-parse", "openai", "openai_parse.py", "synchronous: chat.completions parse, stream helper",
             core=True, replies=PARSED),
    _in_core("openai-responses", "openai", "openai_responses.py", "responses create, stream helper",
             "responses", fidelity="none"),
    _in_core("openai-agents", "openai-agents", "openai_agents.py", "Runner, OpenAIChatCompletionsModel",
             core=True, arguments=("chat_completions",), variables=_NO_TRACES),
    _in_core("openai-agents-responses", "openai-agents", "openai_agents.py", "Runner, as it comes",
             "responses", fidelity="none", arguments=("responses",), variables=_NO_TRACES),
    _in_core("langchain", "langchain", "langchain_agent.py", "create_agent, ChatOpenAI"),
    _in_core("langgraph", "langgraph", "langgraph_agent.py", "StateGraph, ToolNode, ChatOpenAI", core=True),
    _in_core("anthropic", "anthropic", "anthropic_agent.py", "messages create, stream helper",
             "messages", fidelity="none"),
    _in_core("pydantic-ai", "pydantic-ai-slim", "pydantic_ai_agent.py", "Agent, openai-chat:", core=True,
             arguments=("openai-chat:policy",)),
    _in_core("pydantic-ai-responses", "pydantic-ai-slim", "pydantic_ai_agent.py", "Agent, openai:",
             "responses", fidelity="none", arguments=("openai:policy",)),
    Client("autogen", "autogen-agentchat", "autogen_agent.py", "AssistantAgent, OpenAIChatCompletionClient",
           requires=("autogen-agentchat", "autogen-ext[openai]")),
    Client("crewai", "crewai", "crewai_agent.py", "Crew, Agent, Task", streams=False, variables=_NO_TELEMETRY),
    Client("semantic-kernel", "semantic-kernel", "semantic_kernel_agent.py", "ChatCompletionAgent"),
    Client("agent-framework", "agent-framework-core", "agent_framework_agent.py", "Agent, OpenAIChatClient",
           "responses", "none", requires=("agent-framework-core", "agent-framework-openai"),
           arguments=("responses",)),
    Client("agent-framework-chat", "agent-framework-core", "agent_framework_agent.py",
           "Agent, OpenAIChatCompletionClient", env="agent-framework",
           requires=("agent-framework-core", "agent-framework-openai"), arguments=("chat",)),
    Client("dspy", "dspy", "dspy_agent.py", "ReAct", streams=False, variables=_NO_PRICE_LIST, replies=DSPY),
    Client("llama-index", "llama-index-core", "llama_index_agent.py", "FunctionAgent, OpenAI",
           requires=("llama-index-core", "llama-index-llms-openai"),
           variables={"OPENAI_API_BASE": "{root}/v1"}),
    Client("smolagents", "smolagents", "smolagents_agent.py", "ToolCallingAgent, OpenAIServerModel",
           requires=("smolagents[openai]",), replies=SMOLAGENTS),
    Client("google-adk", "google-adk", "google_adk_agent.py", "LlmAgent, LiteLlm",
           requires=("google-adk", "litellm"), variables=_NO_PRICE_LIST),
    Client("litellm", "litellm", "litellm_agent.py", "acompletion", variables=_NO_PRICE_LIST),
)  # fmt: skip
