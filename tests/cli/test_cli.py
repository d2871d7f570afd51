"""The command line: help with examples, refusals in one line, and every command on real data."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import urllib.request
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from typer.testing import CliRunner, Result

from lightning_proxy.cli import app
from lightning_proxy.store import Fidelity, Generation, RolloutState, Span, Store
from tests.conftest import ProxyThread

DOCUMENTED = (
    "init",
    "serve",
    "train",
    "run",
    "tasks",
    "rollouts",
    "spans",
    "reward",
    "policies",
    "prune",
    "status",
    "doctor",
    "demo",
    "export",
    "import",
)
_OF_POLICIES = [("policies", name) for name in ("compare", "promote", "rollback")]
ALL_COMMANDS = [(name,) for name in DOCUMENTED] + _OF_POLICIES


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cli(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def ok(*words: str | Path) -> str:
    result = cli(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: str | Path, code: int = 2) -> str:
    """What a command says when it refuses: on stderr, never with a traceback."""
    result = cli(*words)
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.stderr
    return result.stderr


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command: Sequence[str]) -> None:
    text = ok(*command, "--help")
    assert "Examples:" in text
    assert f"  lightning-proxy {' '.join(command)}" in text


def test_the_commands_are_the_documented_ones() -> None:
    listed = ok("--help").split("Commands:")[1].split("\n\n")[0]
    assert {line.split()[0] for line in listed.strip().splitlines()} == set(DOCUMENTED)


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-m", "lightning_proxy.cli", "--help"], check=True, capture_output=True)
    seconds = (
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    )  # of CPU: others may load the machine
    assert seconds < 0.4


def test_help_loads_no_room() -> None:
    program = (
        "import sys, lightning_proxy.cli\n"
        "print([m for m in sys.modules if m.startswith('lightning_proxy.') and not "
        "m.startswith(('lightning_proxy.cli', 'lightning_proxy.errors', 'lightning_proxy.words'))], "
        "'pydantic' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[] False\n"


def test_the_version_is_told() -> None:
    assert ok("--version").startswith("lightning-proxy 0.")


# --- init and refusals --------------------------------------------------------------------------


def test_init_writes_a_commented_file_that_the_other_commands_take() -> None:
    ok("init")
    assert "# port = 8080" in Path("lightning.toml").read_text()
    assert "does not answer" in ok("status", "--proxy", "http://127.0.0.1:9")


def test_init_does_not_replace_a_file_unless_told_to() -> None:
    Path("lightning.toml").write_text("[proxy]\nport = 1234\n")
    assert "--force" in refused("init")
    assert "1234" in Path("lightning.toml").read_text()
    ok("init", "--force")
    assert "1234" not in Path("lightning.toml").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("serve",), "give --upstream URL"),
        (("serve", "--upstream", "127.0.0.1:8000"), "must be a URL that begins with http:// or https://"),
        (("serve", "--upstream", "http://x/v1", "--port", "99999"), "a whole number from 0 to 65535"),
        (("serve", "--upstream", "http://x/v1", "--host", "0.0.0.0"), "set proxy.token"),
        (("serve", "--upstream", "http://x/v1", "--config", "gone.toml"), "lightning-proxy init gone.toml"),
        (("serve", "--model", "no-such-weights"), "no-such-weights"),
        (("reward", "r-1", "nan"), "a finite number"),
        (("reward", "x", "1", "--kind", "span"), "a whole number"),
        (("reward", "r-1", "good"), "valid"),
        (("reward",), "a --file of rewards"),
        (("reward", "r-1", "--file", "/dev/null"), "--file stands alone"),
        (("reward", "r-1", "--thumb", "sideways"), "up"),
        (("rollouts", "--state", "done"), "open"),
        (("spans", "--limit", "0"), "1"),
        (("prune",), "--older-than"),
        (("prune", "--older-than", "30"), "30d"),
        (("prune", "--tag", "customer"), "KEY=VALUE"),
        (("trian",), "train"),
    ],
)
def test_bad_input_is_refused_with_what_would_be_right(words: Sequence[str], said: str) -> None:
    assert said in refused(*words)


@pytest.mark.parametrize("command", ["rollouts", "spans", "policies"])
def test_without_a_database_it_is_said_what_makes_one(command: str) -> None:
    message = refused(command, "--db", "none.db", code=1)
    assert message.startswith("lightning-proxy: no database at none.db; ")
    assert not Path("none.db").exists()


def test_without_a_proxy_it_is_said_how_to_start_one() -> None:
    for words in (
        ("reward", "r-1", "1"),
        ("policies", "rollback"),
        ("policies", "promote", "1"),
        ("run", "--", "true"),
    ):
        assert "lightning-proxy serve" in refused(words[0], *_with_proxy(words[1:]), code=1)


def _with_proxy(words: Sequence[str]) -> list[str]:
    """--proxy goes behind a subcommand and before a command's own words."""
    at = 1 if words[0] in ("rollback", "promote") else 0
    return [*words[:at], "--proxy", "http://127.0.0.1:9", *words[at:]]


def test_an_unknown_setting_is_one_line_naming_the_nearest_known_one() -> None:
    Path("lightning.toml").write_text("[proxy]\nprot = 1\n")
    assert refused("status") == (
        "lightning-proxy: unknown setting proxy.prot in lightning.toml, line 2; did you mean proxy.port?\n"
    )


def test_a_traceback_is_shown_when_asked_for() -> None:
    command = [sys.executable, "-m", "lightning_proxy.cli"]
    for words, env in ((["--traceback", "spans"], {}), (["spans"], {"LIGHTNING_DEBUG": "1"})):
        result = subprocess.run([*command, *words], capture_output=True, text=True, env=env, check=False)
        assert result.returncode == 1
        assert "Traceback" in result.stderr


# --- what was recorded --------------------------------------------------------------------------


@pytest.fixture
def db() -> Path:
    """A database with a rollout of two calls, a reward that was corrected, and two versions."""
    path = Path("lightning.db")
    question = {"model": "policy", "messages": [{"role": "user", "content": "What is 6 times 7?"}]}
    call = {"function": {"name": "multiply", "arguments": '{"a": 6, "b": 7}'}}
    reply = {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [call]}}]}
    common: dict[str, Any] = {
        "rollout_id": "r-1",
        "attempt": 1,
        "wire": "chat",
        "started_at": 1.7e9,
        "ended_at": 1.7e9 + 0.5,
    }
    with Store.open(path) as store:
        store.create_rollout(rollout_id="r-1", task_id="task-1")
        Path("weights").mkdir()
        store.add_base_version("policy", Path("weights").resolve())
        generation = Generation(
            array("i", [1, 2, 3]), array("i", [4, 5]), array("f", [-0.1, -0.2]), "tool_calls"
        )
        store.add_span(
            Span(**common, request=json.dumps(question).encode(), response=json.dumps(reply).encode(),
                 fidelity=Fidelity.EXACT, model="policy", policy="policy", policy_version=0, status=200,
                 generations=(generation,))
        )  # fmt: skip
        store.add_span(
            Span(
                **common,
                request=b"not json",
                fidelity=Fidelity.TEXT,
                error_class="upstream_cut",
                error="lost",
            )
        )
        store.add_reward(rollout_id="r-1", value=0.5)
        store.add_reward(rollout_id="r-1", value=1.0, source="judge")
        store.finish_rollout("r-1", RolloutState.SUCCEEDED)
        store.create_rollout(rollout_id="r-2")
    return path


def as_json(*words: str | Path) -> Any:
    return json.loads(ok(*words, "--json"))


def test_rollouts_are_listed_and_chosen(db: Path) -> None:
    table = ok("rollouts", "--db", db)
    assert "r-1" in table
    assert "task-1" in table
    assert "r-2" not in ok("rollouts", "--state", "succeeded")
    listed = as_json("rollouts", "--task-id", "task-1")["rollouts"]
    assert [(r["rollout"]["rollout_id"], r["spans"], r["errors"], r["reward"]) for r in listed] == [
        ("r-1", 2, 1, 1.0)
    ]


def test_one_rollout_shows_its_calls_and_its_ledger(db: Path) -> None:
    text = ok("rollouts", "r-1")
    assert "rollout r-1, task task-1: succeeded" in text
    assert "2 calls" in text
    assert "2 rewards" in text
    shown = as_json("rollouts", "r-1")
    assert [reward["value"] for reward in shown["rewards"]] == [0.5, 1.0]
    assert "r-9" in refused("rollouts", "r-9", code=1)


def test_spans_are_listed_with_their_token_counts(db: Path) -> None:
    table = ok("spans", "--rollout", "r-1")
    assert "3+2" in table
    assert "upstream_cut" in table
    heads = as_json("spans")["spans"]
    assert [(head["prompt_tokens"], head["response_tokens"]) for head in heads] == [(None, None), (3, 2)]
    assert "request" not in heads[0]


@pytest.mark.parametrize(
    ("wire", "request_", "response", "shown"),
    [
        (
            "messages",
            {
                "system": "Be brief.",
                "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            },
            {"content": [{"type": "text", "text": "ho"}]},
            ["[system] Be brief.", "[user] hi", "[reply] ho"],
        ),
        (
            "responses",
            {"instructions": "Be brief.", "input": "hi"},
            {"output": [{"type": "function_call", "call_id": "c", "name": "sql", "arguments": "{}"}]},
            ["[system] Be brief.", "[user] hi", "[reply] -> sql({})"],
        ),
    ],
)
def test_a_span_of_any_api_shows_who_said_what(
    db: Path, wire: str, request_: dict[str, Any], response: dict[str, Any], shown: list[str]
) -> None:
    with Store.open(db) as store:
        span = next(span for span in store.list_spans() if span.generations)
        bodies: dict[str, Any] = {
            "request": json.dumps(request_).encode(),
            "response": json.dumps(response).encode(),
        }
        span_id = store.add_span(replace(span, span_id=None, response_id=None, wire=wire, **bodies))
    text = ok("spans", str(span_id))
    assert [line for line in shown if line not in text] == []


def test_one_span_shows_messages_reply_and_tokens(db: Path) -> None:
    text = ok("spans", "1")
    assert "tokens: 3 read, 2 written, 2 logprobs; fidelity exact" in text
    assert "[user] What is 6 times 7?" in text
    assert '[reply] -> multiply({"a": 6, "b": 7})' in text
    assert as_json("spans", "1")["generations"][0]["response_token_ids"] == [4, 5]
    assert "[error: upstream_cut] lost" in ok("spans", "2")
    assert "99" in refused("spans", "99", code=1)


def test_options_may_stand_before_a_spans_id(db: Path) -> None:
    assert json.loads(ok("spans", "--json", "--db", db, "1"))["span_id"] == 1
    assert "valid integer" in refused("spans", "writer")


def _add_agent(store: Store, number: int, system: str, *tools: str, role: str | None = None) -> None:
    body = {
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": "go"}],
        "tools": [{"type": "function", "function": {"name": tool}} for tool in tools],
    }
    store.add_span(
        Span(f"r-{number}", 1, "chat", 1.7e9, 1.7e9, json.dumps(body).encode(), Fidelity.TEXT,
             role=role, response=b"{}")
    )  # fmt: skip


def test_agents_are_told_apart_and_named_by_pasting_what_is_printed(db: Path) -> None:
    with Store.open(db) as store:
        for number in range(3):
            _add_agent(store, number, f"You write.\nIt is 10:0{number}.", "save", "open")
        _add_agent(store, 1, 'You "judge".', role="judge")
    found = as_json("spans", "roles")
    heads = [(r["calls"], r["rollouts"], r["role"], r["tools"], r["recorded_as"]) for r in found["roles"]]
    assert (3, 3, None, ["open", "save"], []) in heads
    assert (1, 1, None, [], ["judge"]) in heads
    assert (1, 1, None, [], []) in heads  # without a system prompt; what is no JSON is no agent
    table = ok("spans", "roles")
    assert "You write. It is 10:02." in table
    assert found["toml"] in table
    Path("lightning.toml").write_text(found["toml"])
    named = as_json("spans", "roles")
    assert {r["role"] for r in named["roles"]} == {f"agent-{found['roles'][0]['fingerprint']}", "judge"} | {
        f"agent-{r['fingerprint']}" for r in found["roles"] if not r["system"]
    }
    assert named["toml"] == ""
    assert "[[roles]]" not in ok("spans", "roles")


def test_only_the_newest_calls_are_looked_at(db: Path) -> None:
    with Store.open(db) as store:
        _add_agent(store, 1, "You write.")
        _add_agent(store, 2, "You judge.")
    assert [r["system"] for r in as_json("spans", "roles", "--limit", "1")["roles"]] == ["You judge."]


def test_policies_are_listed(db: Path) -> None:
    assert str(Path("weights").resolve()) in ok("policies")
    assert [v["version"] for v in as_json("policies")["versions"]] == [0]


def test_status_tells_the_whole_circle(db: Path) -> None:
    text = ok("status", "--proxy", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in text
    assert "2, 1 open, 0 incomplete" in text
    assert "policy: version 0" in text
    status = as_json("status", "--proxy", "http://127.0.0.1:9")
    assert status["proxy"]["answers"] is False
    assert status["store"]["counts"]["spans"] == 2
    assert status["store"]["backlog"]["rollouts_ready"] == 1
    assert status["store"]["last_run"] is None


# --- training -----------------------------------------------------------------------------------


def test_nothing_to_train_on_is_said_and_is_no_failure(db: Path) -> None:
    assert ok("train").startswith("nothing: 1 rewarded rollouts wait")
    assert as_json("train")["outcome"] == "nothing"
    assert cli("train", "--require-update").exit_code == 3


def test_a_dry_run_shows_what_waits_and_takes_nothing(db: Path) -> None:
    assert "1 rewarded rollouts wait" in ok("train", "--dry-run")
    with Store.open(db) as store:
        assert store.list_runs() == []


def test_a_second_run_says_who_holds_the_lease(db: Path) -> None:
    with Store.open(db) as store:
        store.begin_run("policy", owner="elsewhere:42", lease_s=60)
    assert "elsewhere:42" in refused("train", code=1)


def test_a_run_without_weights_says_where_they_should_be(db: Path) -> None:
    Path("lightning.toml").write_text("[train]\nmin_rollouts = 1\n")
    Path("weights").rmdir()
    assert f"not at {Path('weights').resolve()}" in refused("train", code=1)


def test_watching_goes_with_neither_a_dry_run_nor_a_required_update() -> None:
    for other in ("--dry-run", "--require-update", "--retry"):
        assert "--watch goes on" in refused("train", "--watch", other)


def next_report(stdout: IO[str]) -> Any:
    """The next of the JSON objects that a watching trainer prints."""
    text = ""
    for line in stdout:
        text += line
        if line == "}\n":
            break
    return json.loads(text)


@pytest.mark.train  # it loads what it will need before there is work
def test_watching_repeats_and_ends_on_a_signal(db: Path) -> None:
    Path("lightning.toml").write_text("[train]\nwatch_interval_s = 0.1\n")
    command = [sys.executable, "-m", "lightning_proxy.cli", "train", "--watch", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert next_report(process.stdout)["outcome"] == "nothing"
        with Store.open(db) as store:  # one more rollout is ready: the next pass has something else to say
            span = next(span for span in store.list_spans() if span.generations)
            with store.transaction():  # a pass between the two would have something else to say, too
                store.add_span(replace(span, rollout_id="r-3", span_id=None, response_id=None))
                store.add_reward(rollout_id="r-3", value=1.0)
        assert next_report(process.stdout)["message"].startswith("2 rewarded rollouts")
        process.terminate()
        assert process.wait(60) == 128 + 15


# --- through a running proxy --------------------------------------------------------------------

AGENT = """
import json, os, urllib.request
body = json.dumps({"model": "policy", "messages": [{"role": "user", "content": "hello"}]}).encode()
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
print(urllib.request.urlopen(urllib.request.Request(url, body, headers)).status)
"""


def test_run_reward_and_status_work_on_a_running_proxy(proxy: ProxyThread) -> None:
    at = ("--proxy", proxy.url)
    words = (
        "run",
        *at,
        "--rollout-id",
        "r-7",
        "--task-id",
        "t",
        "--role",
        "solver",
        "--",
        sys.executable,
        "-c",
        AGENT,
    )
    ok(*words)
    shown = as_json("rollouts", "r-7", "--db", proxy.db)
    assert shown["rollout"]["state"] == "succeeded"
    assert [(span["role"], span["attributed_by"]) for span in shown["spans"]] == [("solver", "path")]

    assert ok("reward", "r-7", "-0.5", "--source", "judge", *at) == "reward -0.5 for rollout r-7 recorded\n"
    again = ("reward", "r-7", "1", "--idempotency-key", "k", "--json", *at)
    assert [json.loads(ok(*again))["created"] for _ in range(2)] == [True, False]
    ok("reward", str(shown["spans"][0]["span_id"]), "2", "--kind", "span", *at)
    ok("reward", shown["spans"][0]["response_id"], "3", "--kind", "response", *at)
    assert len(as_json("rollouts", "r-7", "--db", proxy.db)["rewards"]) == 4
    assert "r-8" in refused("reward", "r-8", "1", *at, code=1)

    assert as_json("status", "--db", proxy.db, *at)["proxy"] == {
        "url": proxy.url, "answers": True, "ready": True, "why": "",
    }  # fmt: skip
    assert "ready" in ok("status", "--db", proxy.db, *at)


def test_rewards_are_given_as_thumbs_demonstrations_and_files(proxy: ProxyThread) -> None:
    at = ("--proxy", proxy.url)
    ok("run", *at, "--rollout-id", "r-7", "--", sys.executable, "-c", AGENT)
    assert ok("reward", "r-7", "--thumb", "down", *at) == "reward down for rollout r-7 recorded\n"
    assert ok("reward", "r-7", "--demonstration", "It is 42.", *at) == "entry for rollout r-7 recorded\n"
    lines = [json.dumps({"rollout_id": "r-7", "value": n, "idempotency_key": f"k{n}"}) for n in (0.5, 2)]
    Path("rewards.jsonl").write_text(lines[0] + "\n\n" + lines[1] + "\n")
    assert ok("reward", "--file", "rewards.jsonl", *at) == "2 rewards taken, 0 of them were recorded before\n"
    assert json.loads(ok("reward", "--file", "rewards.jsonl", "--json", *at)) == {"taken": 2, "created": 0}
    text = ok("rollouts", "r-7", "--db", proxy.db)
    assert "4 rewards" in text
    assert [line.split()[:2] + line.split()[4:5] for line in text.splitlines()[-4:]] == [
        ["-1.0", "thumb", "yes"],
        ["-", "reward", "-"],
        ["0.5", "reward", "no"],
        ["2.0", "reward", "yes"],
    ]
    assert "It is 42." in text
    assert as_json("rollouts", "r-7", "--db", proxy.db)["rewards"][1]["demonstration"] == "It is 42."
    assert as_json("rollouts", "--db", proxy.db)["rollouts"][0]["reward"] == 1.0


def test_a_file_of_rewards_is_refused_with_its_line(proxy: ProxyThread) -> None:
    Path("rewards.jsonl").write_text('{"rollout_id": "r-7", "value": 1}\n{"rollout_id"\n')
    assert "line 2 is no JSON" in refused("reward", "--file", "rewards.jsonl", "--proxy", proxy.url)
    Path("rewards.jsonl").write_text('{"rollout_id": "r-7", "value": 1}\n')
    message = refused("reward", "--file", "rewards.jsonl", "--proxy", proxy.url, code=1)
    assert "lines 1 to 1 were not taken, 0 rewards before them were: rewards[0]: no rollout 'r-7'" in message


def test_a_failing_command_under_run_keeps_its_exit_code(proxy: ProxyThread) -> None:
    result = cli(
        "run", "--proxy", proxy.url, "--rollout-id", "r-7", "--", sys.executable, "-c", "raise SystemExit(9)"
    )
    assert result.exit_code == 9
    assert as_json("rollouts", "r-7", "--db", proxy.db)["rollout"]["reason"] == "exit code 9"


def test_versions_change_hands_through_the_proxy(proxy: ProxyThread) -> None:
    message = refused("policies", "promote", "7", "--proxy", proxy.url, code=1)
    assert "7" in message
    assert "no earlier version" in refused("policies", "rollback", "--proxy", proxy.url, code=1)


def test_serve_says_when_calls_can_come(proxy_process: Any) -> None:
    with urllib.request.urlopen(f"{proxy_process.url}/readyz", timeout=60) as response:
        assert response.status == 200
    assert proxy_process.terminate() == 0


# --- several policies ---------------------------------------------------------------------------

TWO_POLICIES = """
[train]
min_rollouts = 2
[[policies]]
name = "checker"
model = "models/checker"
train = { min_rollouts = 3 }
"""


def test_every_policy_has_a_pass_and_the_worst_of_them_is_the_exit_code(db: Path) -> None:
    Path("lightning.toml").write_text(TWO_POLICIES)
    said = ok("train")
    assert "policy: nothing: 1 rewarded rollouts wait, [train] min_rollouts asks for 2" in said
    assert "checker: nothing: 0 rewarded rollouts wait, [train] min_rollouts asks for 3" in said
    assert [each["policy"] for each in as_json("train")] == ["policy", "checker"]
    assert [each["outcome"] for each in as_json("train", "--dry-run")] == ["dry_run", "dry_run"]
    assert cli("train", "--require-update").exit_code == 3
    with Store.open(db) as store:
        store.begin_run("policy", owner="elsewhere:42", lease_s=60)
    failed = cli("train", "--json", "--require-update")
    assert failed.exit_code == 1
    first, second = json.loads(failed.stdout)
    assert (first["policy"], first["outcome"]) == ("policy", "failed")
    assert "elsewhere:42" in first["message"]
    assert (second["policy"], second["outcome"]) == ("checker", "nothing")


def test_one_policy_can_be_chosen(db: Path) -> None:
    Path("lightning.toml").write_text(TWO_POLICIES)
    assert ok("train", "--policy", "checker").startswith("nothing: 0 rewarded rollouts wait")
    assert as_json("train", "--policy", "checker")["policy"] == "checker"
    assert "there are 'policy', 'checker'" in refused("train", "--policy", "chekcer", code=2)


def test_the_status_tells_of_every_policy(db: Path) -> None:
    Path("lightning.toml").write_text(TWO_POLICIES)
    said = ok("status")
    assert "policy      policy: " in said
    assert "policy      checker: no version yet" in said
    assert said.count("to train on") == said.count("last run") == 2
    further = as_json("status")["store"]["further_policies"]
    assert further["checker"]["backlog"]["rollouts_ready"] == 0
