"""``python -m conformance``: try clients, say what came of it, and write it down."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import Any

from conformance.clients import CLIENTS, Client
from conformance.environments import CannotInstall, environment_for
from conformance.judge import Verdict, try_client
from conformance.report import read_results, record, write_results


def main() -> int:
    """Returns 1 if a client failed."""
    parser = argparse.ArgumentParser(prog="python -m conformance", description="Run real clients through us.")
    parser.add_argument("--only", help="names of clients, with commas between them")
    parser.add_argument("--core", action="store_true", help="those that CI runs")
    parser.add_argument("--fresh", action="store_true", help="make their environments anew")
    args = parser.parse_args()
    clients = [client for client in CLIENTS if client.core or not args.core]
    if args.only:
        names = args.only.split(",")
        unknown = set(names) - {client.name for client in CLIENTS}
        if unknown:
            parser.error(f"no client {', '.join(sorted(unknown))}; there are {', '.join(_NAMES)}")
        clients = [client for client in clients if client.name in names]
    fresh = {client.env or client.name for client in clients} if args.fresh else set()
    results, states = read_results(), Counter[str]()
    for client in clients:
        made = client.env or client.name
        results[client.name] = _try(client, made in fresh)
        fresh.discard(made)  # clients that share an environment make it once
        write_results(results)
        states[results[client.name]["state"]] += 1
    print(", ".join(f"{count} {state}" for state, count in states.items()), "- see docs/conformance.md")
    return 1 if states["failed"] else 0


def _try(client: Client, fresh: bool) -> dict[str, Any]:
    started, versions = time.monotonic(), dict[str, str]()
    try:
        environment = environment_for(client, fresh=fresh)
        versions = environment.versions
        verdict = try_client(client, environment)
    except CannotInstall as error:
        verdict = Verdict([], not_run=str(error))
    result = record(client, versions, verdict)
    version = versions.get(client.package, "")
    print(f"{client.name} {version}: {result['state']}, {time.monotonic() - started:.0f} s", flush=True)
    for line in filter(None, [verdict.not_run, *verdict.wrong]):
        print(f"    {line}", flush=True)
    return result


_NAMES = [client.name for client in CLIENTS]

if __name__ == "__main__":
    sys.exit(main())
