"""One client's trial: its agent straight before the engine, then through a proxy, then the comparison."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance.clients import Client
from conformance.environments import ROOT, Environment
from conformance.replies import LAST, LINE, STREAMED, WHOLE, rules
from lightning_proxy.store import Fidelity, Span, Store

WIRES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
_STREAMED = {"both": {True, False}, "always": {True}, "never": {False}}
_RANK: dict[str, int] = {fidelity.value: rank for rank, fidelity in enumerate(Fidelity)}
_RESULT = re.compile(r'\{"line":.*\}$', re.MULTILINE)  # some frameworks print without a line end
ENGINE = "tests.engine.fake_engine"
_DELAY_S = "0.02"  # before each answer, so that runs overlap


@dataclass(frozen=True, slots=True)
class Attribution:
    """How the calls of runs that went on at the same time were told apart."""

    calls: int
    right: int  # calls that lie in their run's own rollout
    mixed: int  # rollouts with calls of more than one run


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a trial. It is passed where it was run and nothing is wrong."""

    wrong: list[str]
    not_run: str | None = None  # why
    fails_alone: bool = False  # the agent does not work straight before the engine either
    calls: int = 0  # that the agent makes
    spans: dict[str, int] = field(default_factory=dict)  # "chat exact" -> how many
    same_answer: bool = False
    attribution: Attribution | None = None  # None: no spans to attribute


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an agent did before one server."""

    status: int
    results: list[dict[str, Any]]  # one for each task, in the order of the tasks
    errors: str
    calls: list[str]  # paths of the POSTs that the engine saw


def try_client(client: Client, environment: Environment) -> Verdict:
    """Run a client's agent straight and through the proxy, and judge."""
    with tempfile.TemporaryDirectory(prefix="conformance-") as name:
        room = Path(name)
        (room / "rules.json").write_text(rules(client.replies), encoding="utf-8")
        command = [sys.executable, "-m", ENGINE, "--rules", str(room / "rules.json")]
        with _serving([*command, "--delay-s", _DELAY_S], room) as engine:
            if not _speaks(engine, client.wire):
                return Verdict([], not_run=f"the fake engine does not speak {client.wire} yet")
            straight = _run_agent(client, environment, engine, engine, room)
            db = room / "lightning.db"
            command = [sys.executable, "-m", "lightning_proxy.cli", "serve", "--upstream", f"{engine}/v1"]
            with _serving([*command, "--port", "0", "--db", str(db)], room) as proxy:
                proxied = _run_agent(client, environment, proxy, engine, room)
        with Store.open(db) as store:
            spans = store.list_spans(limit=10_000)
    return judge(client, straight, proxied, spans)


def judge(client: Client, straight: Outcome, proxied: Outcome, spans: Sequence[Span]) -> Verdict:
    """Compare what an agent did without and with the proxy, and look at what was recorded.

    The calls that an agent makes are those that the engine saw straight: a proxy may ask the engine in
    other ways, and things of its own.
    """
    alone = _faults(client, straight)
    wrong = [f"proxied: {fault}" for fault in _faults(client, proxied)]
    same = straight.results == proxied.results and straight.status == proxied.status
    if not same:
        wrong.append(f"straight it printed {straight.results}, proxied {proxied.results}")
    calls = [WIRES[path] for path in straight.calls if path in WIRES]
    if set(calls) != {client.wire}:
        wrong.append(f"it was to speak {client.wire}, and spoke {sorted(set(calls))}")
    seen = Counter(f"{span.wire} {span.fidelity.value}" for span in spans)
    if client.fidelity == "none":
        if Counter(straight.calls) != Counter(proxied.calls):
            wrong.append(f"calls straight {Counter(straight.calls)}, proxied {Counter(proxied.calls)}")
    elif Counter(span.wire for span in spans) != Counter(calls) or any(
        _RANK[span.fidelity] > _RANK[client.fidelity] for span in spans
    ):
        wrong.append(f"spans: {dict(seen)}, expected {len(calls)} {client.wire} {client.fidelity}")
    told = attribution(spans) if spans else None
    if told and told.mixed:
        wrong.append(f"{told.mixed} rollouts hold calls of several runs")
    streamed = {span.streamed for span in spans}
    if spans and streamed != _STREAMED[client.streams]:
        wrong.append(f"streamed spans: {streamed}, expected {_STREAMED[client.streams]}")
    return Verdict(
        wrong=wrong if not alone else [f"straight: {fault}" for fault in alone] + wrong,
        fails_alone=bool(alone),
        calls=len(calls),
        spans=dict(seen),
        same_answer=same,
        attribution=told,
    )


def attribution(spans: Sequence[Span]) -> Attribution:
    """Compare the rollouts that calls were put into with the runs that made them.

    A call's run is told by the line that its request names. A run's own rollout is the one with the most
    of its calls, unless another run has more calls in it.
    """
    held: dict[str, Counter[str]] = {}  # rollout -> run -> calls
    for span in spans:
        named = re.search(LINE, span.request.decode(errors="replace"))
        if named is not None:
            held.setdefault(span.rollout_id, Counter())[named["line"]] += 1
    own: dict[str, int] = {}
    for runs in held.values():
        run, calls = runs.most_common(1)[0]
        own[run] = max(own.get(run, 0), calls)
    total = sum(runs.total() for runs in held.values())
    return Attribution(total, sum(own.values()), sum(len(runs) > 1 for runs in held.values()))


def _faults(client: Client, outcome: Outcome) -> list[str]:
    """What an agent did not do that it should have done, whatever it was connected to."""
    if outcome.status != 0:
        return [f"exit {outcome.status}: {outcome.errors[-1500:]}"]
    faults = []
    done = {result["line"]: result for result in outcome.results}
    for line in _lines(client):
        result = done.get(line)
        if result is None:
            faults.append(f"no result for {line}; it said: {outcome.errors[-1500:]}")
        elif result["called"] != [f"{line}-{number}" for number in range(LAST)]:
            faults.append(f"{line}: the tool was called with {result['called']}")
        elif f"{line}-{LAST}" not in str(result["answer"]):
            faults.append(f"{line}: it answered {result['answer']!r}")
    return faults


def _lines(client: Client) -> tuple[str, ...]:
    return WHOLE + STREAMED if client.streams == "both" else WHOLE


def _run_agent(client: Client, environment: Environment, server: str, engine: str, room: Path) -> Outcome:
    tasks = [f"{line}:stream" if line in STREAMED else line for line in _lines(client)]
    home = Path(tempfile.mkdtemp(dir=room))
    _ask(f"{engine}/_requests", "DELETE")
    try:
        done = subprocess.run(
            [*environment.command, *client.arguments, *tasks],
            cwd=home,
            env=_environ(client, environment, server, home),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=client.timeout_s,
        )
        status, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        status, output, errors = -1, "", f"no end after {client.timeout_s} s: {late.stderr!r}"
    results = [json.loads(found) for found in _RESULT.findall(output)]
    requests = _ask(f"{engine}/_requests")["requests"]
    calls = [seen["target"].partition("?")[0] for seen in requests if seen["method"] == "POST"]
    return Outcome(status, results, errors or output, calls)


def _environ(client: Client, environment: Environment, server: str, home: Path) -> dict[str, str]:
    """A clean environment, with the variables that everybody sets to use another endpoint."""
    standard = {
        "OPENAI_BASE_URL": "{root}/v1",
        "OPENAI_API_KEY": "any",
        "ANTHROPIC_BASE_URL": "{root}",
        "ANTHROPIC_API_KEY": "any",
    }
    given = {name: value.format(root=server) for name, value in {**standard, **client.variables}.items()}
    path = f"{environment.binaries}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", **given}


def _speaks(engine: str, wire: str) -> bool:
    """Whether the fake engine has a wire's route; what it does not know it echoes."""
    path = next(path for path, name in WIRES.items() if name == wire)
    request = urllib.request.Request(engine + path, b"{}", {"content-type": "application/json"})
    with _opened(request) as answer:
        return "x-echo-method" not in answer.headers


@contextmanager
def _opened(request: urllib.request.Request) -> Iterator[Any]:
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        with error:
            yield error


def _ask(url: str, method: str = "GET") -> dict[str, Any]:
    with _opened(urllib.request.Request(url, method=method)) as answer:
        parsed: dict[str, Any] = json.load(answer)
        return parsed


@contextmanager
def _serving(command: Sequence[str], room: Path) -> Iterator[str]:
    """A server that prints its URL, as a process; yields that URL."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = room / "server.log"
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, cwd=room, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        with process.stdout as output:
            found = re.search(r"http://[^\s/]+", output.readline())
            if found is None:
                raise RuntimeError(f"{command[2]} did not say where it listens: {log.read_text()}")
            yield found.group()
            process.terminate()
            process.wait(30)
    finally:
        process.kill()
        process.wait()
