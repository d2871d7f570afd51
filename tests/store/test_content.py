"""A conversation is stored once, and every span gives back exactly what it held."""

from __future__ import annotations

import inspect
import json
import random
import re
import tracemalloc
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from lightning_proxy.store import Generation, Span, Store, archive
from lightning_proxy.store.content import Content, Encoded, _common_head, _common_tail, decode
from tests.store.support import make_span

# -- random branching conversations ------------------------------------------------------------------

_LARGEST_ID = 2**31 - 1
token_ids = st.one_of(
    st.lists(st.integers(0, 40_000) | st.sampled_from([0, _LARGEST_ID, 2**24, 255, 256]), max_size=12).map(
        lambda ids: array("i", ids)
    ),
    st.integers(0, 2**32).map(lambda seed: array("i", random.Random(seed).choices(range(40_000), k=700))),
)
logprobs = st.lists(st.floats(width=32, allow_nan=False), max_size=8).map(lambda values: array("f", values))
utterances = st.one_of(
    st.binary(max_size=40),  # no UTF-8, most of them
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
    # Long ones, for long bodies and long lists of ids are told in another way than short ones.
    st.integers(0, 2**32).map(lambda seed: random.Random(seed).randbytes(9000)),
    st.integers(1, 400).map(lambda count: b"over and over " * count),
)


@dataclass
class Speaker:
    """One agent's conversation as it stands: what its next request will hold."""

    said: list[bytes] = field(default_factory=list)
    ids: array[int] = field(default_factory=lambda: array("i"))

    def body(self) -> bytes:
        return b'{"messages":[' + b",".join(self.said) + b'],"tools":[{"name":"run"}],"stream":false}'


class Conversations(RuleBasedStateMachine):
    """Agents and their sub-agents talk in several attempts, through two connections, with rollbacks."""

    path: Path

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.path.unlink(missing_ok=True)
        for leftover in self.path.parent.glob(f"{self.path.name}-*"):
            leftover.unlink()
        self.stores = [self.stack.enter_context(Store.open(self.path)) for _ in range(2)]
        self.speakers: list[Speaker] = []
        self.written: dict[int, Span] = {}

    @initialize()
    def begin(self) -> None:
        """An agent and its sub-agent, which have nothing in common."""
        self.speakers = [Speaker([b"system"]), Speaker([b"another system"])]

    @rule(
        who=st.integers(0, 1),
        attempt=st.integers(1, 2),
        said=utterances,
        ids=token_ids,
        answers=st.lists(st.tuples(utterances, token_ids, logprobs), max_size=3),
        through=st.integers(0, 1),
        undone=st.booleans(),
        repeated=st.booleans(),
    )
    def call(
        self,
        who: int,
        attempt: int,
        said: bytes,
        ids: array[int],
        answers: list[tuple[bytes, array[int], array[float]]],
        through: int,
        undone: bool,
        repeated: bool,
    ) -> None:
        """A call, recorded; or recorded and rolled back, and then tried again; or the same prompt again."""
        speaker = self.speakers[who]
        if not repeated:
            speaker.said.append(said)
            speaker.ids = speaker.ids + ids
        failed = not answers and said.startswith(b"o")
        span = make_span(
            attempt=attempt,
            request=speaker.body(),
            response=None if failed else b"".join(answer for answer, _, _ in answers),
            error_class="cut_stream" if failed else None,
            generations=tuple(
                Generation(speaker.ids[:], response, values, None if index else "stop")
                for index, (_, response, values) in enumerate(answers)
            ),
        )
        store = self.stores[through]
        if undone:
            with pytest.raises(ZeroDivisionError):
                _write_and_undo(store, span)
        self.written[store.add_span(span)] = span
        if answers and not repeated:
            speaker.said.append(answers[0][0])
            speaker.ids = speaker.ids + answers[0][1]

    @rule(who=st.integers(0, 1), keep=st.integers(0, 3), kept_ids=st.integers(0, 20))
    def rewind(self, who: int, keep: int, kept_ids: int) -> None:
        """Go on from an earlier place, or from a summary."""
        speaker = self.speakers[who]
        speaker.said, speaker.ids = speaker.said[:keep], speaker.ids[:kept_ids]

    @rule(who=st.integers(0, 1), where=st.integers(0, 5), said=utterances, token=st.integers(0, _LARGEST_ID))
    def edit(self, who: int, where: int, said: bytes, token: int) -> None:
        """Change what was said long ago."""
        speaker = self.speakers[who]
        if where < len(speaker.said):
            speaker.said[where] = said
        if where < len(speaker.ids):
            speaker.ids[where] = token

    @rule(order=st.randoms(use_true_random=False), through=st.integers(0, 1))
    def read_singly(self, order: random.Random, through: int) -> None:
        """Any span can be read by itself."""
        for span_id in order.sample(sorted(self.written), min(3, len(self.written))):
            assert self.stores[through].get_span(span_id) == self._expected(span_id)

    @invariant()
    def everything_is_there_in_lists(self) -> None:
        """By attempt, in lists and as heads."""
        store = self.stores[0]
        assert store.list_spans(limit=1000) == [self._expected(i) for i in sorted(self.written, reverse=True)]
        for attempt in (1, 2):
            expected = [self._expected(i) for i, span in self.written.items() if span.attempt == attempt]
            assert list(store.spans_of_attempt("r1", attempt)) == expected
        newest = sorted(self.written, reverse=True)
        assert [row[3] for row in store.recent_requests(1000)] == [self.written[i].request for i in newest]

    def teardown(self) -> None:
        self.stack.close()

    def _expected(self, span_id: int) -> Span:
        return replace(self.written[span_id], span_id=span_id)


def _write_and_undo(store: Store, span: Span) -> None:
    with store.transaction():
        store.write_span(span)
        raise ZeroDivisionError


def test_random_branching_conversations_come_back_as_they_were(db: Path) -> None:
    Conversations.path = db
    run_state_machine_as_test(
        Conversations,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


@given(st.binary(max_size=300), st.binary(max_size=300), st.binary(max_size=300), st.binary(max_size=300))
def test_what_two_bodies_share_is_counted_exactly(head: bytes, a: bytes, b: bytes, tail: bytes) -> None:
    one, other = head + a + tail, head + b + tail
    shortest = min(len(one), len(other))
    same = next((i for i in range(shortest) if one[i] != other[i]), shortest)
    assert _common_head(one, other) == same
    room = shortest - same
    same_end = next((i for i in range(room) if one[-1 - i] != other[-1 - i]), room)
    assert _common_tail(one, other, room) == same_end


def test_the_same_prompt_answered_alike_comes_back_as_it_was(store: Store) -> None:
    prompt = array("i", range(5000))
    for answer in ([7, 8, 9, 10], [7, 8, 9], [7, 8, 9, 10, 11], [], [7, 8]):
        generation = Generation(prompt, array("i", answer), array("f", [-1.0] * len(answer)), "stop")
        span = make_span(request=b"the same" * 3000, generations=(generation, generation))
        span_id = store.add_span(span)
        assert store.get_span(span_id) == replace(span, span_id=span_id)


# -- size and cost -----------------------------------------------------------------------------------

_SOURCE = "".join(inspect.getsource(module) for module in (inspect, json.decoder, random, re))


def coding_agent(turns: int, *, rollout_id: str = "r1", turn_bytes: int = 4000) -> Iterator[Span]:
    """A conversation that grows by a tool's result each turn; a token is a word."""
    random_ = random.Random(0)
    vocabulary: dict[str, int] = {}

    def ids_of(text: str) -> list[int]:
        return [
            vocabulary.setdefault(word, len(vocabulary)) for word in re.findall(r" ?\w+|\s+|[^\w\s]+", text)
        ]

    messages: list[dict[str, str]] = [{"role": "system", "content": _SOURCE[:8000]}]
    ids = ids_of(_SOURCE[:8000])
    for turn in range(turns):
        at = random_.randrange(len(_SOURCE) - turn_bytes - 1000)
        reply, result = _SOURCE[at : at + 700], _SOURCE[at + 1000 : at + 1000 + turn_bytes]
        answer = {"role": "assistant", "content": reply}
        written = array("i", ids_of(reply))
        yield make_span(
            rollout_id=rollout_id,
            response_id=f"chatcmpl-{turn}",
            request=json.dumps({"model": "policy", "messages": messages, "stream": False}).encode(),
            response=json.dumps({"id": f"chatcmpl-{turn}", "choices": [{"message": answer}]}).encode(),
            generations=(
                Generation(
                    array("i", ids),
                    written,
                    array("f", [-random_.expovariate(3) for _ in written]),
                    "tool_calls",
                ),
            ),
        )
        messages += [answer, {"role": "tool", "content": result}]
        ids += [*written, *ids_of(result)]


def test_a_long_conversation_takes_a_twentieth_of_its_requests_and_responses(db: Path) -> None:
    spans = list(coding_agent(50))
    with Store.open(db) as store:
        ids = [store.add_span(span) for span in spans]
    raw = sum(len(span.request) + len(span.response or b"") for span in spans)
    size = sum(file.stat().st_size for file in db.parent.glob(f"{db.name}*"))
    assert raw / size > 20, f"{raw} bytes of bodies in {size}"
    with Store.open(db) as store:
        read = store.spans_of_attempt("r1", 1)
    assert read == tuple(replace(span, span_id=i) for i, span in zip(ids, spans, strict=True))


def test_bodies_of_many_megabytes_are_stored_once_too(store: Store) -> None:
    body = random.Random(1).randbytes(6 * 2**20)
    ids = array("i", random.Random(2).choices(range(100_000), k=2**20))
    for change in (b"", b" and more", b" and other things"):
        edited = body[:1000] + change + body[1000 : 5 * 2**20] + change + body[5 * 2**20 :]
        turned = ids[:10] + array("i", [7] * len(change)) + ids[10:]
        span = make_span(request=edited, generations=(Generation(turned, array("i", [1]), array("f"), None),))
        span_id = store.add_span(span)
        assert store.get_span(span_id) == replace(span, span_id=span_id)
    sizes = [row[0] for row in store.rows("SELECT length(request) + length(tokens) FROM contents")]
    assert sizes[0] > 8 * 2**20
    assert max(sizes[1:]) < 20_000


def test_reading_one_of_thousands_of_calls_reads_few_of_them(store: Store) -> None:
    with store.transaction():
        for number in range(1000):
            last = store.write_span(make_span(request=b'{"messages":[%s]}' % (b"x" * number)))
    assert store.scalar("SELECT max(depth) FROM contents") <= 200
    statements: list[str] = []
    store.connection.set_trace_callback(statements.append)
    assert len(store.get_span(last).request) == len(b'{"messages":[]}') + 999
    assert len(statements) < 250


def test_reading_one_call_holds_no_more_than_a_few(store: Store) -> None:
    with store.transaction():
        for number in range(100):
            last = store.write_span(make_span(request=b"a" * 100_000 + b"b" * number))
    tracemalloc.start()
    store.get_span(last)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_500_000


def test_content_is_told_by_content_of_the_same_attempt_only(store: Store) -> None:
    for rollout_id, attempt in (("r1", 1), ("r1", 2), ("r2", 1), ("r1", 1)):
        store.add_span(make_span(rollout_id=rollout_id, attempt=attempt, request=b"the same" * 2000))
    pairs = store.rows(
        "SELECT s.rollout_id || s.attempt AS here, b.rollout_id || b.attempt AS there FROM contents AS c "
        "JOIN spans AS s USING (span_id) JOIN spans AS b ON b.span_id = c.base"
    )
    assert [(row["here"], row["there"]) for row in pairs] == [("r11", "r11")]


def test_a_conversation_that_goes_on_after_a_restart_is_still_stored_once(db: Path) -> None:
    for span in coding_agent(12):
        with Store.open(db) as store:
            store.add_span(span)
    with Store.open(db) as store:
        assert store.scalar("SELECT count(*) FROM contents WHERE base IS NULL") == 1


def test_processes_that_take_turns_store_a_conversation_once(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Encoded] = []

    def counting(told: Encoded, base: Content | None) -> object:
        decoded.append(told)
        return decode(told, base)

    monkeypatch.setattr(archive, "decode", counting)
    with Store.open(db) as one, Store.open(db) as other:
        for turn, span in enumerate(coding_agent(12)):
            (one, other)[turn % 2].add_span(span)
        assert len(decoded) == 11  # each only what the other one has just written
        assert one.scalar("SELECT count(*) FROM contents WHERE base IS NOT span_id - 1") == 1


def test_sub_agents_that_take_turns_are_told_by_their_own_calls(store: Store) -> None:
    main, sub = coding_agent(6), coding_agent(6, turn_bytes=3000)
    for ours, theirs in zip(main, sub, strict=True):
        store.add_span(ours)
        store.add_span(replace(theirs, request=theirs.request.replace(b"system", b"developer", 1)))
    bases = [row[0] for row in store.rows("SELECT base FROM contents ORDER BY span_id")][4:]
    assert bases == list(range(3, 11))


def test_heads_are_read_without_content(store: Store) -> None:
    span_id = store.add_span(make_span())
    store.connection.execute("UPDATE contents SET request = x'00', response = x'00', tokens = x'00'")
    [head] = store.list_spans(content=False)
    assert (head.span_id, head.request, head.response, head.generations) == (span_id, b"", b"", ())
    assert (head.prompt_tokens, head.response_tokens) == (3, 3)


def test_a_response_is_found_without_what_it_was_told_by(store: Store) -> None:
    store.add_span(make_span(request=b"q" * 20_000))
    store.add_span(make_span(request=b"q" * 20_001, response_id="second", response=b"found"))
    store.connection.execute("UPDATE contents SET request = x'00', tokens = x'00'")
    [end] = store.conversation_ends([], ["second"])
    assert end.response == b"found"
