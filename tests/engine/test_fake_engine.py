"""The fake engine does what it says, in vLLM's shapes."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine import EngineThread, FakeEngine, Script
from tests.engine.rules import read_rules

BODY: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": "hello"}]}
EXACT: dict[str, Any] = {"return_token_ids": True, "logprobs": True}


def post(url: str, body: dict[str, Any], script: Script | None = None) -> bytes:
    headers = {"content-type": "application/json", **(script.to_header() if script else {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        read: bytes = response.read()
    return read


def chat(engine: EngineThread, body: dict[str, Any], script: Script | None = None) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(post(f"{engine.base_url}/chat/completions", body, script))
    return answer


def stream(engine: EngineThread, body: dict[str, Any], script: Script | None = None) -> list[dict[str, Any]]:
    raw = post(f"{engine.base_url}/chat/completions", {**body, "stream": True}, script)
    lines = [line for line in raw.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: ")]
    assert lines.pop() == b"data: [DONE]"
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


def test_an_answer_is_what_the_model_says_in_advance(engine: EngineThread) -> None:
    answer = chat(engine, {**BODY, **EXACT})
    expected = engine.model.generate(BODY)
    choice = answer["choices"][0]
    assert answer["prompt_token_ids"] == list(expected.prompt_token_ids)
    assert choice["token_ids"] == expected.choices[0].token_ids
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == expected.choices[0].logprobs
    assert choice["message"]["content"] == expected.choices[0].content
    assert len(choice["token_ids"]) == 64


def test_a_stream_carries_the_same_tokens_in_66_events(engine: EngineThread) -> None:
    chunks = stream(engine, {**BODY, **EXACT})
    expected = engine.model.generate(BODY).choices[0]
    assert len(chunks) + 1 == 66
    assert chunks[0]["prompt_token_ids"] == list(engine.model.prompt_ids(BODY))
    assert [token for chunk in chunks[1:] for token in chunk["choices"][0]["token_ids"]] == expected.token_ids
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.content


def test_the_next_turns_prompt_extends_prompt_and_answer(engine: EngineThread) -> None:
    calls = (("sql", '{"query": "SELECT 1"}'),)
    first = chat(engine, {**BODY, **EXACT}, Script(tool_calls=calls))
    message = first["choices"][0]["message"]
    assert first["choices"][0]["finish_reason"] == "tool_calls"
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "1"}
    second = chat(engine, {**BODY, **EXACT, "messages": [*BODY["messages"], message, result]})
    read = first["prompt_token_ids"] + first["choices"][0]["token_ids"]
    assert second["prompt_token_ids"][: len(read)] == read


@pytest.mark.parametrize("per_chunk", [1, 3, 1000])
def test_streamed_tool_calls_add_up_to_the_whole_one(engine: EngineThread, per_chunk: int) -> None:
    calls = (("sql", '{"query": "SELECT 1"}'), ("sql", '{"query": "é"}'))
    script = Script(text="Well: ", tool_calls=calls, tokens_per_chunk=per_chunk)
    chunks = stream(engine, {**BODY, **EXACT}, script)
    whole = chat(engine, {**BODY, **EXACT}, script)["choices"][0]
    arguments: dict[int, str] = {}
    for chunk in chunks:
        for call in chunk["choices"][0]["delta"].get("tool_calls", ()):
            at = call["index"]
            arguments[at] = arguments.get(at, "") + call["function"]["arguments"]
    assert list(arguments.values()) == [arguments_ for _, arguments_ in calls]
    assert [call["function"]["arguments"] for call in whole["message"]["tool_calls"]] == list(
        arguments.values()
    )
    assert [t for chunk in chunks[1:] for t in chunk["choices"][0]["token_ids"]] == whole["token_ids"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_stream_may_be_split_within_characters_and_lines(engine: EngineThread, end: Any) -> None:
    script = Script(text="naïve 漢字 😀", split=1, line_end=end, comments=True)
    chunks = stream(engine, {**BODY, **EXACT}, script)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "naïve 漢字 😀"


@pytest.mark.parametrize("by", ["close", "reset"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_cut_answer_never_ends_cleanly(engine: EngineThread, streamed: bool, by: Any) -> None:
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        post(
            f"{engine.base_url}/chat/completions",
            {**BODY, "stream": streamed},
            Script(cut_after=9, cut_by=by),
        )


def test_a_scripted_error_keeps_its_headers_and_is_used_once(engine: EngineThread) -> None:
    engine.script(Script(status=429, body='{"error": "slow"}', headers={"retry-after": "7"}))
    with pytest.raises(urllib.error.HTTPError) as error:
        chat(engine, BODY)
    with error.value as answer:
        assert (answer.code, answer.headers["retry-after"], answer.read()) == (429, "7", b'{"error": "slow"}')
    assert chat(engine, BODY)["object"] == "chat.completion"


def test_what_the_engine_cannot_read_ends_the_connection(engine: EngineThread) -> None:
    with socket.create_connection(("127.0.0.1", engine.port), timeout=60) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert connection.recv(1) == b""


def test_replies_can_be_chosen_by_what_a_request_says(
    make_engine: Callable[[FakeEngine], EngineThread], tmp_path: Path
) -> None:
    rules = [
        {"when": "(?P<who>ann|bob)-1", "text": r"Hello, \g<who>."},
        {"when": "(?P<who>ann|bob)", "tool_calls": [["greet", r'{"name": "\g<who>"}']]},
    ]
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    engine = make_engine(FakeEngine(rules=read_rules(tmp_path / "rules.json")))

    def reply(said: str) -> Any:
        return chat(engine, {**BODY, "messages": [{"role": "user", "content": said}]})["choices"][0][
            "message"
        ]

    assert reply("I am bob")["tool_calls"][0]["function"] == {"name": "greet", "arguments": '{"name": "bob"}'}
    assert reply("I am bob, and ann-1")["content"] == "Hello, ann."
    assert len(reply("I am eve")["content"]) == 63  # the model's own, where no rule fits


def test_a_rule_with_an_unknown_word_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text('[{"when": "x", "txet": "y"}]')
    with pytest.raises(ValueError, match="txet"):
        read_rules(tmp_path / "rules.json")


def test_a_connection_can_be_reset_before_the_answer(engine: EngineThread) -> None:
    with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected, urllib.error.URLError)):
        chat(engine, BODY, Script(reset=True))


def test_probe_logprobs_change_with_the_weights(engine: EngineThread, tmp_path: Path) -> None:
    probe = {"model": "policy", "prompt": [5, 6, 7], "max_tokens": 1, "prompt_logprobs": 0}
    before = json.loads(post(f"{engine.base_url}/completions", probe))["choices"][0]["prompt_logprobs"]
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}
    post(f"{engine.url}/pause?mode=keep", {})
    post(f"{engine.url}/collective_rpc", reload)
    post(f"{engine.url}/resume", {})
    after = json.loads(post(f"{engine.base_url}/completions", probe))["choices"][0]["prompt_logprobs"]
    assert before != after
    assert after[1]["6"]["logprob"] == engine.model.logprob(1, 6)


def test_a_bad_reload_leaves_health_good_and_kills_at_the_next_inference(
    engine: EngineThread, tmp_path: Path
) -> None:
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "nothing")}}
    with pytest.raises(urllib.error.HTTPError) as error:
        post(f"{engine.url}/collective_rpc", reload)
    error.value.close()
    assert urllib.request.urlopen(f"{engine.url}/health", timeout=60).status == 200
    with pytest.raises((ConnectionError, urllib.error.URLError)):
        chat(engine, BODY)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{engine.url}/health", timeout=60)


def test_other_paths_are_echoed_and_everything_is_noted(engine: EngineThread) -> None:
    echoed = post(f"{engine.base_url}/embeddings?x=1", {"input": "é"})
    assert json.loads(echoed) == {"input": "é"}
    assert [(seen.method, seen.target) for seen in engine.requests] == [("POST", "/v1/embeddings?x=1")]


def test_token_ids_can_be_refused(make_engine: Callable[[FakeEngine], EngineThread]) -> None:
    engine = make_engine(FakeEngine(refuse_token_ids=True))
    with pytest.raises(urllib.error.HTTPError) as error:
        chat(engine, {**BODY, **EXACT})
    error.value.close()
    assert chat(engine, BODY)["choices"][0]["token_ids"] is None


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
@pytest.mark.parametrize("extra", [{}, EXACT, {**EXACT, "top_logprobs": 2, "n": 2}])
def test_whole_answers_have_the_fields_of_vllm(engine: EngineThread, extra: dict[str, Any]) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse

    for script in (Script(), Script(tool_calls=(("f", "{}"),))):
        answer = chat(engine, {**BODY, **extra}, script)
        assert ChatCompletionResponse.model_validate(answer).model_dump() == answer
    prompt = {"prompt": "hello", "return_token_ids": True, "logprobs": 1, "prompt_logprobs": 0}
    answer = json.loads(post(f"{engine.base_url}/completions", prompt))
    parsed = CompletionResponse.model_validate(answer).model_dump(mode="json")
    assert json.loads(json.dumps(parsed)) == answer


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
@pytest.mark.parametrize("extra", [{}, EXACT])
def test_chunks_have_the_fields_of_vllm(engine: EngineThread, extra: dict[str, Any]) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse

    wanted = {**BODY, **extra, "stream_options": {"include_usage": True}}
    for script in (Script(), Script(tool_calls=(("f", '{"a": 1}'),))):
        for chunk in stream(engine, wanted, script):
            parsed = ChatCompletionStreamResponse.model_validate(chunk)
            assert json.loads(parsed.model_dump_json(exclude_unset=True)) == chunk


# -- Responses -----------------------------------------------------------------------------------

RESPONSES: dict[str, Any] = {"model": "policy", "input": "hello"}
TOLD: dict[str, Any] = {"enable_response_messages": True, "include": ["message.output_text.logprobs"]}


def response_events(engine: EngineThread, body: dict[str, Any], script: Script) -> list[dict[str, Any]]:
    raw = post(f"{engine.base_url}/responses", {**RESPONSES, **body, "stream": True}, script)
    lines = [event.split(b"\n") for event in raw.removesuffix(b"\n\n").split(b"\n\n")]
    events = [json.loads(data.removeprefix(b"data: ")) for _, data in lines]
    assert [name for name, _ in lines] == [b"event: " + event["type"].encode() for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_a_response_holds_the_chat_answers_tokens(engine: EngineThread) -> None:
    chat_answer = chat(engine, {**BODY, **EXACT})
    answer = json.loads(post(f"{engine.base_url}/responses", {**RESPONSES, **TOLD}))
    assert answer["input_messages"][0]["tokens"] == chat_answer["prompt_token_ids"]
    assert answer["output_messages"][0]["tokens"] == chat_answer["choices"][0]["token_ids"]
    (part,) = answer["output"][0]["content"]
    assert part["text"] == chat_answer["choices"][0]["message"]["content"]
    logprobs = [entry["logprob"] for entry in chat_answer["choices"][0]["logprobs"]["content"]]
    assert [entry["logprob"] for entry in part["logprobs"]] == logprobs


@pytest.mark.parametrize("per_chunk", [1, 3, 1000])
def test_a_streamed_responses_pieces_add_up_to_its_last_event(engine: EngineThread, per_chunk: int) -> None:
    calls = (("sql", '{"query": "SELECT 1"}'), ("sql", '{"query": "é"}'))
    events = response_events(engine, {}, Script(text="Well:", tool_calls=calls, tokens_per_chunk=per_chunk))
    pieces: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            pieces[event["item_id"]] = pieces.get(event["item_id"], "") + event["delta"]
    assert list(pieces.values()) == ["Well:", calls[0][1], calls[1][1]]
    text, *made = events[-1]["response"]["output"]
    assert text["content"][0]["text"] == "Well:"
    assert tuple((call["name"], call["arguments"]) for call in made) == calls


def test_responses_are_kept_where_that_was_asked_for(
    make_engine: Callable[[FakeEngine], EngineThread],
) -> None:
    for keeps in (True, False):
        engine = make_engine(FakeEngine(store_responses=keeps))
        response_id = json.loads(post(f"{engine.base_url}/responses", RESPONSES))["id"]
        connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=60)
        connection.request("GET", f"/v1/responses/{response_id}")
        answer = connection.getresponse()
        assert answer.status == (200 if keeps else 404)
        assert (response_id in json.loads(answer.read()).values()) is keeps
        connection.close()


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
@pytest.mark.parametrize("extra", [{}, TOLD, {"tools": [{"type": "function", "name": "f"}]}])
def test_responses_have_the_fields_of_vllm(engine: EngineThread, extra: dict[str, Any]) -> None:
    from pydantic import TypeAdapter
    from vllm.entrypoints.openai.responses.protocol import ResponsesResponse

    adapter = TypeAdapter(ResponsesResponse)
    for script in (Script(), Script(text="So:", tool_calls=(("f", '{"a": 1}'),))):
        answer = json.loads(post(f"{engine.base_url}/responses", {**RESPONSES, **extra}, script))
        events = response_events(engine, extra, script)
        for whole in (answer, events[0]["response"], events[-1]["response"]):
            parsed = adapter.validate_python(whole).model_dump_json(by_alias=True)
            assert json.loads(parsed) == whole
