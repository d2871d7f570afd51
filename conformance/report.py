"""What the last trials found: ``results.json`` holds it, docs/conformance.md shows it.

``python -m conformance.report`` prints the page.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conformance.clients import CLIENTS, Client
from conformance.environments import ROOT
from conformance.judge import Verdict

RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "conformance.md"
Results = dict[str, dict[str, Any]]  # client -> what its last trial found

_HEAD = """\
# Which clients were run, and what came of it

`make conformance` makes this page. It runs real, unmodified clients, the newest of each, in an environment of
its own. An agent has one tool and makes three calls for a task, the last of which answers. It carries several
tasks out at once in one process (coding agents: one process for each), half of them streamed where the client
streams. It knows nothing of a proxy: it gets `OPENAI_BASE_URL` or `ANTHROPIC_BASE_URL`, a key, and what the
last table says. The model is the fake engine of the tests, which answers as vLLM does.

*Passed* means: the agent ended well, called its tool as it should and printed the right answers; it made the
same calls and printed the same, character for character, straight before the engine; and every call that it
made through the proxy is a span, as shown under *captured as*.

```
make conformance                                  # all clients
make conformance ARGS="--only langgraph,openai"   # two of them
make conformance ARGS="--fresh"                   # in new environments, with the newest versions
```
"""
_ATTRIBUTION = """
## Runs that nobody told apart

The same trials: several tasks at once in one process, and no ids in path, headers or keys but those that
coding agents send by themselves. A call is *right* when it lies in its own run's rollout, that is in the one
with most calls of that run; of a run whose calls are all apart, one call counts. *Mixed* rollouts hold calls
of more than one run: there must be none.
"""
_SETTINGS = """
## What else a client needs

Beside the standard variables. `{root}` is the server's address. Most of these keep a client from sending
traces or looking for price lists elsewhere.
"""
_METAGPT = """
MetaGPT 0.8.2 does not install on Python 3.11 and was not run. It takes the endpoint from `llm.base_url` in
its `config2.yaml`, with `llm.api_type: openai`, and speaks Chat Completions, as most of the clients above.
"""


def record(client: Client, versions: dict[str, str], verdict: Verdict) -> dict[str, Any]:
    """What is kept of a trial."""
    if verdict.wrong:
        state = "fails without us too" if verdict.fails_alone else "failed"
    else:
        state = "not run" if verdict.not_run else "passed"
    return {
        "state": state,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions,
        "calls": verdict.calls,
        "spans": verdict.spans,
        "same_answer": verdict.same_answer,
        "attribution": asdict(verdict.attribution) if verdict.attribution else None,
        "why": verdict.not_run or (verdict.wrong[0][:300] if verdict.wrong else None),
    }


def read_results() -> Results:
    """The last trial of each client that was ever tried."""
    results: Results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return results


def write_results(results: Results) -> None:
    """Keep the trials of the clients in the table, and make the page of them."""
    known = {client.name: results[client.name] for client in CLIENTS if client.name in results}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(known), encoding="utf-8")


def page(results: Results) -> str:
    """The text of docs/conformance.md."""
    tried = [(client, results[client.name]) for client in CLIENTS if client.name in results]
    clients = _table(
        (
            "client",
            "version",
            "what of it",
            "API",
            "streamed",
            "result",
            "calls",
            "captured as",
            "as without us",
        ),
        [
            (
                client.name,
                result["versions"].get(client.package, ""),
                client.api,
                client.wire,
                {"both": "with and without"}.get(client.streams, client.streams),
                f"{result['state']} {result['date']}",
                str(result["calls"] or ""),
                _captured(result),
                "" if result["state"] == "not run" else "yes" if result["same_answer"] else "no",
            )
            for client, result in tried
        ],
    )
    faults = [f"- {client.name}: {result['why']}" for client, result in tried if result["why"]]
    runs = _table(
        ("client", "API", "calls", "right", "mixed rollouts"),
        [
            (client.name, client.wire, str(found["calls"]), _share(found), str(found["mixed"]))
            for client, result in tried
            if (found := result["attribution"])
        ],
    )
    settings = _table(
        ("client", "variables", "to know"),
        [
            (
                client.name,
                ", ".join(f"`{name}={value}`" for name, value in client.variables.items()),
                client.note,
            )
            for client, _ in tried
            if client.variables or client.note
        ],
    )
    parts = [_HEAD, clients, *(["\nWhy not:\n", *faults] if faults else [])]
    return "\n".join([*parts, _ATTRIBUTION, runs, _SETTINGS, settings, _METAGPT.rstrip(), ""])


def _captured(result: dict[str, Any]) -> str:
    spans: dict[str, int] = result["spans"]
    return ", ".join(f"{count} {kind}" for kind, count in spans.items()) or "none"


def _share(found: dict[str, Any]) -> str:
    return f"{found['right']} ({100 * found['right'] / found['calls']:.0f} %)"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(page(read_results()), end="")
