"""The corpus, sent to real vLLM and through the proxy: status, headers, bodies and events are vLLM's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from lightning_proxy.proxy.wires import wire_for
from lightning_proxy.store import Fidelity
from tests import responses_compare
from tests.proxy.corpus import MESSAGE_FIELDS, RESPONSE_FIELDS, RESPONSES, Case, corpus
from tests.proxy.raw_http import Answer, send
from tests.vllm.compare import Close, comparable
from tests.vllm.conftest import MODEL, TRIES, Served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

numbers = itertools.count()
# vLLM answers these, and its tokens are not asked for: Python's JSON reader takes more than the
# standard has, and `echo` mixes the prompt into the answer.
NOT_EXACT = {
    "a byte order mark", "UTF-16", "Infinity", "numbers of every size", "a lone surrogate",
    "echo", "echo, streamed",
}  # fmt: skip


@pytest.mark.parametrize("case", corpus(MODEL), ids=str)
def test_an_agent_gets_what_vllm_itself_would_have_answered(served: Served, case: Case) -> None:
    captured = wire_for(case.method, case.target.partition("?")[0]) is not None
    rollout = f"corpus-{next(numbers)}"
    prefix = f"/rollout/{rollout}" if captured else ""
    directs: list[Answer] = []
    for tries in range(TRIES):
        directs.append(ask(served.engine_url, case))
        through_us = ask(f"{served.url}{prefix}-{tries}" if captured else served.url, case)
        wanted = said(through_us, case)
        direct = next((one for one in directs if said(one, case) == wanted), directs[-1])
        if not direct.body.startswith((b"data:", b"event:")) or said(direct, case) == wanted:
            break
    assert (through_us.status, through_us.reason) == (direct.status, direct.reason)
    assert through_us.end_to_end_headers == direct.end_to_end_headers
    assert said(through_us, case) == said(direct, case)
    assert framing(through_us, case) == framing(direct, case)
    if captured:
        check_span(served, f"{rollout}-{tries}", case, direct.status)


def ask(url: str, case: Case) -> Answer:
    return send(url, case.target, case.body, case.headers, method=case.method, timeout=120)


def said(answer: Answer, case: Case) -> Any:
    """The body, without what chance decides."""
    text = answer.body.decode()
    if case.target.partition("?")[0] == RESPONSES and text.startswith(("{", "event:")):
        return responses_compare.comparable(text, Close)
    return comparable(text)


def framing(answer: Answer, case: Case) -> str:
    """How the end of the body is told; the length itself may differ where ids and logprobs do."""
    if answer.header("transfer-encoding") is not None:
        return "chunked"
    length = answer.header("content-length")
    if length is not None and case.method != "HEAD":
        assert int(length) == len(answer.body)
    return "nothing" if length is None else "length"


def must_be_exact(case: Case) -> bool:
    """Whether the tokens of an answer have to be on record."""
    wire, _, which = case.name.partition(": ")
    if (
        wire == "messages"
    ):  # fields that this API does not have are not translated: such a call goes on as it is
        return which.removesuffix(", streamed") in {"plain", "streamed", *MESSAGE_FIELDS}
    if wire == "responses":
        return which.removesuffix(", streamed") in {"plain", "streamed", *RESPONSE_FIELDS}
    return which not in NOT_EXACT


def check_span(served: Served, rollout: str, case: Case, status: int) -> None:
    """What the engine answered is recorded exactly; what it refused, as refused."""
    with served.store() as store:
        (span,) = store.list_spans(rollout_id=rollout)
    if status >= 400:
        refused = ("upstream_refused", "context_overflow")
        assert span.error_class in (("upstream_error",) if status >= 500 else refused)
    else:
        fidelities = (Fidelity.EXACT,) if must_be_exact(case) else (Fidelity.EXACT, Fidelity.TEXT)
        assert span.error_class is None
        assert span.fidelity in fidelities


def test_vllm_has_no_websocket_for_responses_and_the_agent_is_told_so(served: Served) -> None:
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
               ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")]  # fmt: skip
    direct = send(served.engine_url, "/v1/responses", None, upgrade)
    assert (direct.status, direct.body) == (403, b""), "uvicorn's way to say that there is none"
    answer = send(served.url, "/v1/responses", None, upgrade)
    assert (answer.status, answer.json["error"]["code"]) == (426, "upgrade_required")
