"""The grader: its own process, after the fact. Runs the gold queries and posts rewards.

    python -m lightning_proxy.demo.grade --url http://127.0.0.1:8080 --tasks TASKS --results RESULTS

It sees no model call and no agent: only the tasks, the answers and the proxy's ``/reward``. A right
answer is worth 1, anything else 0. Grading the same results twice posts nothing twice.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sqlite3
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any


def is_right(answer: str | None, expected: str) -> bool:
    """Whether an answer equals the gold query's result; numbers are compared as numbers."""
    if answer is None:
        return False
    try:
        return float(answer) == float(expected)
    except ValueError:
        return answer.strip() == expected


def gold_answer(db: Path, query: str) -> str:
    """First value of the gold query's result."""
    with closing(sqlite3.connect(f"{db.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        (value,) = connection.execute(query).fetchone()
    return f"{value:g}" if isinstance(value, float) else str(value)


def rewards_for(
    tasks: Iterable[Mapping[str, Any]], results: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One reward for each result; the bodies that ``/reward`` takes."""
    gold = {task["task_id"]: gold_answer(Path(task["db"]), task["gold_query"]) for task in tasks}
    rewards = []
    for result in results:
        expected = gold[result["task_id"]]
        rewards.append(
            {
                "rollout_id": result["rollout_id"],
                "value": float(is_right(result["answer"], expected)),
                "source": "sqlite-grader",
                "comment": f"expected {expected}, got {result['answer']}",
                "idempotency_key": f"sqlite-grader/{result['rollout_id']}",
            }
        )
    return rewards


def post(url: str, rewards: list[dict[str, Any]], token: str | None = None) -> None:
    """Post all rewards at once; they are durable on return. SystemExit if the proxy refuses."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(f"{url}/reward", json.dumps(rewards).encode(), headers, method="POST")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            response.read()
    except urllib.error.HTTPError as error:
        sys.exit(f"grade: {url}/reward answered {error.code}: {error.read().decode(errors='replace')}")
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"grade: no answer from {url}/reward: {error}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def main() -> None:
    """Command line; prints ``{"graded", "mean"}``."""
    parser = argparse.ArgumentParser(description="Grade results and post the rewards.")
    parser.add_argument("--url", required=True, help="the proxy, e.g. http://127.0.0.1:8080")
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    rewards = rewards_for(read_lines(args.tasks), read_lines(args.results))
    post(args.url.rstrip("/"), rewards, os.environ.get("LIGHTNING_PROXY__TOKEN"))
    mean = sum(reward["value"] for reward in rewards) / len(rewards) if rewards else None
    print(json.dumps({"graded": len(rewards), "mean": mean}))


if __name__ == "__main__":
    main()
