"""CPU time per captured call, beside nginx and a bare forwarder, in one run on one machine.

Each round puts the same load on every serving process in turn, so that a machine that is busy or
slow for a while is so for all of them. At the end every call must be in the database, with its
tokens. Nothing here asserts on time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import serving
from benchmarks.serving import Serving
from lightning_proxy.store import Fidelity, Span, Store

# DESIGN.md section 9, where there is one: CPU ms per call, whole and streamed.
TARGETS = {
    "nginx": ("0.044", "-"),
    "bare aiohttp forwarder": ("0.35-0.50", "-"),
    "lightning-proxy": ("<= 0.6", "<= 1.0"),
}
ANSWER_TOKENS = 64
WARM_UP_CALLS = 50


@dataclass(slots=True)
class Measured:
    """What was measured of one serving process in one mode."""

    cpu_ms: list[float] = field(default_factory=list)  # per call, one figure a round
    per_s: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)  # every call, one client
    first_byte_ms: list[float] = field(default_factory=list)


Results = dict[tuple[str, bool], Measured]


class Bench:
    """Everything that runs, and the count of what was sent."""

    def __init__(self, args: argparse.Namespace, everything: Sequence[Serving]) -> None:
        self._args = args
        self._everything = everything
        self._sent: dict[str, int] = {one.name: 0 for one in everything}
        self._rollouts = 0
        self.results: Results = {
            (one.name, streamed): Measured() for one in everything for streamed in (False, True)
        }

    def sent_to(self, name: str) -> int:
        """How many calls a serving process has answered."""
        return self._sent[name]

    def run(self) -> None:
        """Warm up, then the rounds under load, then one client alone."""
        for one in self._everything:
            for streamed in (False, True):
                self._load(one, streamed, WARM_UP_CALLS, self._args.clients)
        for round_ in range(self._args.rounds):
            _say(f"round {round_ + 1} of {self._args.rounds}")
            for streamed in (False, True):
                for one in self._everything:
                    self._measure_cpu(one, streamed)
        _say("latency, one client")
        for _ in range(self._args.rounds):
            for streamed in (False, True):
                for one in self._everything:
                    self._measure_latency(one, streamed)

    def _measure_cpu(self, one: Serving, streamed: bool) -> None:
        before = one.cpu_s()
        came = self._load(one, streamed, self._args.calls, self._args.clients)
        measured = self.results[one.name, streamed]
        measured.cpu_ms.append((one.cpu_s() - before) * 1000 / self._args.calls)
        measured.per_s.append(self._args.calls / came["seconds"])

    def _measure_latency(self, one: Serving, streamed: bool) -> None:
        came = self._load(one, streamed, max(self._args.calls // 5, 20), 1)
        measured = self.results[one.name, streamed]
        measured.latency_ms += came["latency_ms"]
        measured.first_byte_ms += came["first_byte_ms"]

    def _load(self, one: Serving, streamed: bool, calls: int, clients: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.load", one.url, "--calls", str(calls)]
        command += ["--clients", str(clients), "--first-rollout", str(self._rollouts)]
        command += ["--stream"] if streamed else []
        done = subprocess.run(command, cwd=serving.ROOT, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"the load on {one.name} broke:\n{done.stderr}")
        came: dict[str, Any] = json.loads(done.stdout)
        if came["failed"] or came["calls"] != calls:
            raise RuntimeError(f"{one.name} answered {came['calls']} of {calls}, {came['failed']} badly")
        self._rollouts += calls // 10 + 1
        self._sent[one.name] += calls
        return came


def committed(db: Path) -> tuple[int, int]:
    """Spans in the database, and those of them that are exact and give back every token."""
    count = exact = 0
    before: int | None = None
    with Store.open(db, create=False) as store:
        while spans := store.list_spans(limit=500, before=before):
            before = spans[-1].span_id
            count += len(spans)
            exact += sum(_is_whole(span) for span in spans)
    return count, exact


def _is_whole(span: Span) -> bool:
    tokens = [(len(one.response_token_ids), len(one.logprobs)) for one in span.generations]
    whole = tokens == [(ANSWER_TOKENS, ANSWER_TOKENS)]
    return whole and span.fidelity is Fidelity.EXACT and span.status == 200


def table(results: Results, args: argparse.Namespace) -> str:
    """The results in Markdown."""
    lines = [
        f"{args.rounds} rounds of {args.calls} calls by {args.clients} clients; "
        "prompts of 1,000 tokens, answers of 64, streamed in 66 events.",
        "CPU ms per call of the serving process: median (min to max) of the rounds.",
        "Latency: one client, against the engine asked directly.",
        "",
        "| serving process | whole | target | streamed | target | calls/s whole, streamed "
        "| added p50, p99 ms | streamed, to the first byte |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for name, _ in results):
        whole, streamed = results[name, False], results[name, True]
        rates = f"{statistics.median(whole.per_s):.0f}, {statistics.median(streamed.per_s):.0f}"
        direct = name == "the engine itself"
        targets = TARGETS.get(name, ("-", "-"))
        added = (
            []
            if direct
            else [_added(results, name, False, "latency_ms"), _added(results, name, True, "first_byte_ms")]
        )
        cells = [name, _spread(whole.cpu_ms), targets[0], _spread(streamed.cpu_ms), targets[1], rates]
        lines.append("| " + " | ".join(cells + (added or ["-", "-"])) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _added(results: Results, name: str, streamed: bool, what: str) -> str:
    direct = getattr(results["the engine itself", streamed], what)
    through = getattr(results[name, streamed], what)
    return ", ".join(f"{_quantile(through, q) - _quantile(direct, q):.2f}" for q in (50, 99))


def _quantile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run it all; exit status 1 where a call is missing from the database."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=1000, help="per round, process and mode")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write every figure to this file too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lightning-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        engine = serving.start_engine(folder)
        stack.callback(engine.stop)
        nginx = serving.start_nginx(folder, engine)
        proxy = serving.start_proxy(folder, engine)
        everything = [engine, *([nginx] if nginx else []), serving.start_bare(folder, engine), proxy]
        for one in everything[1:]:
            stack.callback(one.stop)
        bench = Bench(args, everything)
        bench.run()
        proxy.stop()
        spans, exact = committed(folder / "lightning.db")
    print(table(bench.results, args))
    if nginx is None:
        print("\nnginx is not on PATH and was left out (Debian: apt-get install nginx-light).")
    print(f"\nLoad average at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.")
    sent = bench.sent_to(proxy.name)
    print(f"Calls through lightning-proxy: {sent}. Spans committed: {spans}, exact and whole: {exact}.")
    if args.json:
        figures = [
            {"name": name, "streamed": streamed, "cpu_ms": m.cpu_ms, "calls_per_s": m.per_s}
            for (name, streamed), m in bench.results.items()
        ]
        args.json.write_text(json.dumps(figures, indent=1))
    if not sent == spans == exact:
        sys.exit("some calls are missing from the database")


if __name__ == "__main__":
    main()
