"""What agents get through us, and what we record, on real vLLM."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from lightning_proxy.config import load_settings
from lightning_proxy.doctor import Level, examine
from lightning_proxy.proxy.served import STARTING
from lightning_proxy.store import Fidelity, Span
from tests.conftest import wait_until
from tests.vllm.compare import post
from tests.vllm.conftest import MODEL, START_S, WEIGHTS, Served, command_of, engine_of, is_ready

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "sql",
            "description": "Run a query.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string"}},
                "required": ["query"],
            },
        },
    }
]
MESSAGES: Any = [
    {"role": "system", "content": "items(price, stock)"},
    {"role": "user", "content": "What is the highest price?"},
]


def spans_of(served: Served, rollout_id: str) -> list[Span]:
    with served.store() as store:
        return store.list_spans(rollout_id=rollout_id)[::-1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tools", [False, True])
def test_a_call_becomes_an_exact_span_with_the_ids_that_vllm_would_render(
    served: Served, stream: bool, tools: bool
) -> None:
    rollout = f"exact-{stream}-{tools}"
    body: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, "seed": 3}
    body |= {"stream": stream} | ({"tools": TOOLS} if tools else {})
    post(f"{served.url}/rollout/{rollout}/v1/chat/completions", body)
    (span,) = spans_of(served, rollout)
    assert span.fidelity is Fidelity.EXACT
    (generation,) = span.generations
    assert span.response is not None
    tokenized = post(
        f"{served.engine_url}/tokenize",
        {"model": MODEL, "messages": MESSAGES} | ({"tools": TOOLS} if tools else {}),
    )
    assert generation.prompt_token_ids.tolist() == json.loads(tokenized[2])["tokens"]
    assert len(generation.logprobs) == len(generation.response_token_ids) > 0


def test_recorded_logprobs_are_those_of_the_weights(served: Served) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    body = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 40, "stream": True}
    for seed in range(4):
        post(f"{served.url}/rollout/logprobs/v1/chat/completions", {**body, "seed": seed})
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    spans = spans_of(served, "logprobs")
    assert len(spans) == 4
    for span in spans:
        (generation,) = span.generations
        prompt, response = generation.prompt_token_ids.tolist(), generation.response_token_ids.tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits.double(), -1)[range(len(response)), response]
        assert generation.logprobs.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_openai_sdk_streams_a_tool_call_through_us(served: Served) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "temperature": 0, "max_tokens": 64}
    arguments: dict[int, str] = {}
    content = ""
    for chunk in OpenAI(base_url=f"{served.url}/v1", api_key="any").chat.completions.create(
        **asked, stream=True
    ):
        delta = chunk.choices[0].delta  # a chunk without choices would break this, as it breaks agents
        content += delta.content or ""
        # By hand: the SDK's own accumulator trips over two items of one index in one delta, as vLLM
        # sends them where several tokens share a chunk.
        for call in delta.tool_calls or ():
            said = (call.function and call.function.arguments) or ""
            arguments[call.index] = arguments.get(call.index, "") + said
    direct = OpenAI(base_url=f"{served.engine_url}/v1", api_key="any").chat.completions.create(**asked)
    expected = direct.choices[0].message
    assert content == (expected.content or "")
    assert list(arguments.values()) == [call.function.arguments for call in expected.tool_calls or ()]


def other_weights(directory: Path) -> Path:
    """The demo's model, with a head that was disturbed: other logprobs, same shapes."""
    import torch
    from safetensors.torch import load_file, save_file

    directory.mkdir()
    for file in WEIGHTS.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(WEIGHTS / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    name = "model.norm.weight"
    tensors[name] = tensors[name] * (1 + 0.3 * torch.randn(tensors[name].shape, generator=generator))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def prompt_logprobs(weights: Path, ids: list[int]) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]


def stage(served: Served, path: Path, probe: dict[str, Any]) -> int:
    """Enter a directory as the next staged version, as a training run does."""
    from lightning_proxy.store import PolicyVersion, VersionStatus

    with served.store() as store:
        run = store.begin_run(MODEL, owner="test", lease_s=60)
        number, active = store.next_version(MODEL), store.active_version(MODEL)
        parent = None if active is None else active.version
        version = PolicyVersion(MODEL, number, str(path), VersionStatus.STAGED, parent=parent, probe=probe)
        store.commit_run(run.run_id, report={}, version=version)
    return number


def promote(served: Served, version: int) -> tuple[int, Any]:
    status, _, body = post(f"{served.url}/api/policies/{MODEL}/versions/{version}/promote", {})
    return status, json.loads(body)


@contextmanager
def begun(url: str, body: dict[str, Any]) -> Iterator[HTTPResponse]:
    """A streamed answer of which the first bytes are here: the engine has the call in hand."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.read(1)
        yield answer


def test_weights_change_under_a_running_stream_and_a_wrong_version_is_put_back(
    served: Served, tmp_path: Path
) -> None:
    ids = list(range(5, 40))
    weights = other_weights(tmp_path / "other")
    right = {"prompt_token_ids": ids, "logprobs": prompt_logprobs(weights, ids)}
    wrong = {"prompt_token_ids": ids, "logprobs": prompt_logprobs(WEIGHTS, ids)}

    body = {"model": MODEL, "prompt": "hello", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    try:
        status, answer = promote(served, stage(served, weights, wrong))
        assert (status, answer["error"]["code"]) == (409, "version_rejected")
        probe = {"model": MODEL, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
        entries = json.loads(post(f"{served.engine_url}/v1/completions", probe)[2])["choices"][0]
        told = zip(ids[1:], entries["prompt_logprobs"][1:], strict=True)
        served_now = [entry[str(token)]["logprob"] for token, entry in told]
        assert served_now == pytest.approx(wrong["logprobs"], abs=1e-4)

        good = stage(served, weights, right)
        with begun(f"{served.url}/rollout/in-flight/v1/completions", body) as streaming:
            status, answer = promote(served, good)
            assert status == 200, answer
            assert answer["verify_max_diff"] < 1e-4
            post(f"{served.url}/rollout/after/v1/completions", {**body, "max_tokens": 5, "stream": False})
            streaming.read()
    finally:  # the tests that follow are of version 0
        status, answer = promote(served, 0)
    assert (status, answer["status"]) == (200, "active")

    (flying,) = spans_of(served, "in-flight")
    assert (flying.error_class, len(flying.generations[0].response_token_ids)) == (None, 1500)
    assert (flying.policy_version, flying.policy_version_end) == (0, good)
    (after,) = spans_of(served, "after")
    assert (after.policy_version, after.policy_version_end) == (good, good)


def test_the_doctor_finds_real_vllm_in_order(served: Served) -> None:
    settings = load_settings(
        overrides={"train.proxy_url": served.url, "store.db": served.db, "policy.name": MODEL}
    )
    found = {each.about: each for each in examine(settings)}
    for about in ("proxy", f"engine of {MODEL}"):
        assert found[about].level is Level.OK, found[about]
    assert "weights can be changed" in found[f"engine of {MODEL}"].text


def test_a_killed_engine_is_started_again_and_calls_wait_for_it(served: Served) -> None:
    import psutil

    port = served.engine_url.rsplit(":", 1)[1]
    try:
        for child in psutil.Process(served.process.pid).children(recursive=True):
            if port in command_of(child):
                with suppress(psutil.NoSuchProcess):  # it went with one that was killed before it
                    child.kill()
        # The proxy has noticed, and holds calls; until then they meet an engine that is gone.
        wait_until(lambda: STARTING in waits_for(served.url))
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 5}
        status, _, text = post_patiently(f"{served.url}/v1/chat/completions", body)
        assert status == 200, text
    finally:  # the tests that follow ask the engine that came in its place
        wait_until(lambda: served.process.poll() is not None or is_ready(served.url), START_S)
        served.engine_url = engine_of(served.process)


def waits_for(url: str) -> list[str]:
    """What calls are held for, as /readyz tells it."""
    try:
        answer = urllib.request.urlopen(f"{url}/readyz", timeout=30)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return list(json.load(answer)["waits_for"])


def post_patiently(url: str, body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=START_S) as answer:
        return answer.status, dict(answer.headers), answer.read().decode()
