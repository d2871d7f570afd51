"""What the question-answering agent is told."""

INSTRUCTIONS = "Search, then answer."
TOOL = "search"
TOOL_DESCRIPTION = "Find a fact."
