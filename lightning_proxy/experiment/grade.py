"""The grader: its own process, after the fact. Knows the answers, or runs gold queries, and posts rewards.

    python -m lightning_proxy.experiment.grade --url http://127.0.0.1:8080 --tasks TASKS --results RESULTS

It sees no model call and no agent: only the tasks, the answers and the proxy's ``/reward``. A right
answer is worth 1, anything else 0. Grading the same results twice posts nothing twice. With ``--shuffle`` the
rewards are dealt out among the results at random: a control, from which nothing can be learned.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import sqlite3
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
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


def expected_answer(task: Mapping[str, Any]) -> str:
    """The right one: told by the task, or what its gold query gives."""
    return str(task["answer"]) if "answer" in task else gold_answer(Path(task["db"]), task["gold_query"])


def rewards_for(
    tasks: Iterable[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], shuffle: str | None = None
) -> list[dict[str, Any]]:
    """One reward for each result; the bodies that ``/reward`` takes. ``shuffle`` is the seed of a control."""
    gold = {task["task_id"]: expected_answer(task) for task in tasks}
    values = [float(is_right(result["answer"], gold[result["task_id"]])) for result in results]
    if shuffle is not None:
        random.Random(shuffle).shuffle(values)
    return [
        {
            "rollout_id": result["rollout_id"],
            "value": value,
            "source": "grader" if shuffle is None else "shuffled",
            "comment": f"expected {gold[result['task_id']]}, got {result['answer']}",
            "idempotency_key": f"grader/{result['rollout_id']}",
        }
        for result, value in zip(results, values, strict=True)
    ]


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
    parser.add_argument("--shuffle", metavar="SEED", help="deal the rewards out at random: a control")
    args = parser.parse_args()
    rewards = rewards_for(read_lines(args.tasks), read_lines(args.results), args.shuffle)
    post(args.url.rstrip("/"), rewards, os.environ.get("LIGHTNING_PROXY__TOKEN"))
    mean = sum(reward["value"] for reward in rewards) / len(rewards) if rewards else None
    print(json.dumps({"graded": len(rewards), "mean": mean}))


if __name__ == "__main__":
    main()
