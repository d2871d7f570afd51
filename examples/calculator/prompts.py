"""What the maths agent is told."""

SYSTEM = "Calculate, then answer."
TOOL = "calculator"
TOOL_DESCRIPTION = "Evaluate."
