"""The corpus, sent to real vLLM and through the proxy: status, headers, bodies and events are vLLM's."""

from __future__ import annotations

import pytest

from tests.proxy.corpus import Case, corpus
from tests.proxy.raw_http import Answer, send
from tests.vllm.compare import comparable
from tests.vllm.conftest import MODEL, Served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.mark.parametrize("case", corpus(MODEL), ids=str)
def test_an_agent_gets_what_vllm_itself_would_have_answered(served: Served, case: Case) -> None:
    direct, through_us = (
        send(url, case.target, case.body, case.headers, method=case.method, timeout=120)
        for url in (served.engine_url, served.url)
    )
    assert (through_us.status, through_us.reason) == (direct.status, direct.reason)
    assert through_us.end_to_end_headers == direct.end_to_end_headers
    assert comparable(through_us.body.decode()) == comparable(direct.body.decode())
    assert framing(through_us, case) == framing(direct, case)


def framing(answer: Answer, case: Case) -> str:
    """How the end of the body is told; the length itself may differ where ids and logprobs do."""
    if answer.header("transfer-encoding") is not None:
        return "chunked"
    length = answer.header("content-length")
    if length is not None and case.method != "HEAD":
        assert int(length) == len(answer.body)
    return "nothing" if length is None else "length"
