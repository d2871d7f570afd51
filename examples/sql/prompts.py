"""What the three roles of the text-to-SQL agent are told."""

WRITER = "Write SQL."
CHECKER = "Check SQL."
REWRITER = "Rewrite SQL."
APPROVED = "right"


def writer(tables: str, question: str) -> list[tuple[str, str]]:
    """Asks for a query."""
    return [("system", f"{WRITER}\n{tables}"), ("user", question)]


def checker(tables: str, question: str, query: str, result: str) -> list[tuple[str, str]]:
    """Asks whether a query answers the question."""
    return [("system", f"{CHECKER}\n{tables}"), ("user", f"{question}\n{query}\n{result}")]


def rewriter(tables: str, question: str, query: str, result: str) -> list[tuple[str, str]]:
    """Asks for a better query."""
    return [("system", f"{REWRITER}\n{tables}"), ("user", f"{question}\n{query}\n{result}")]
