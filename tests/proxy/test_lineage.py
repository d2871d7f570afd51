"""Whose call it is, told from conversations: never somebody else's, and one's own wherever it can be."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_proxy.proxy.attribution import Attribution
from lightning_proxy.proxy.lineage import (
    BY_ID_SURE,
    ONE_OF_SEVERAL_SURE,
    PART_SURE,
    REWRITTEN_SURE,
    WHOLE_SURE,
    Lineage,
)
from lightning_proxy.store import ConversationEnd

Json = dict[str, Any]


class Proxy:
    """The part of a proxy that attributes: calls go in with their answers."""

    def __init__(self, lineage: Lineage | None = None, wire: str = "chat") -> None:
        self.lineage = lineage or Lineage()
        self.wire = wire

    def begin(self, request: Json, *, retry: int = 0) -> Attribution:
        place = self.lineage.place_of(self.wire, request)
        return self.lineage.begin(self.wire, json.dumps(request).encode(), place, retry)

    def call(self, request: Json, response: Json, *, retry: int = 0) -> Attribution:
        found = self.begin(request, retry=retry)
        end(found, response)
        return found


def end(found: Attribution, response: Json | None) -> bytes | None:
    assert found.strand is not None
    return found.strand.ended(None if response is None else json.dumps(response).encode())


def chat(*messages: Json, **more: Any) -> Json:
    return {"model": "policy", "messages": list(messages), **more}


def says(text: str) -> Json:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def said(text: str) -> Json:
    return {"role": "assistant", "content": text}


def asked(text: str) -> Json:
    return {"role": "user", "content": text}


def calling(id_: str, text: str | None = None, **arguments: Any) -> Json:
    call = {"id": id_, "type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    return {"role": "assistant", "content": text, "tool_calls": [call]}


def calls(id_: str, text: str | None = None, **arguments: Any) -> Json:
    return {"choices": [{"index": 0, "message": calling(id_, text, **arguments)}]}


def result(id_: str, text: str = "42") -> Json:
    return {"role": "tool", "tool_call_id": id_, "content": text}


UNIQUE = "chatcmpl-tool-7f9a3d5c1e8b4f60a2c4e6f8091b3d5f"
OTHER = "chatcmpl-tool-0a1b2c3d4e5f60718293a4b5c6d7e8f9"


def test_a_call_that_extends_messages_and_reply_belongs_to_the_same_rollout() -> None:
    proxy = Proxy()
    first = proxy.call(chat(asked("a")), says("b"))
    second = proxy.call(chat(asked("a"), said("b"), asked("c")), says("d"))
    third = proxy.call(chat(asked("a"), said("b"), asked("c"), said("d"), asked("e")), says("f"))
    assert first.by == "none"
    assert second.rollout_id == third.rollout_id == first.rollout_id
    assert (third.by, third.confidence) == ("conversation", WHOLE_SURE)


def test_a_call_with_another_reply_or_another_question_stands_alone() -> None:
    proxy = Proxy()
    first = proxy.call(chat(asked("a")), says("b"))
    for messages in ([asked("a"), said("x"), asked("c")], [asked("x"), said("b"), asked("c")], [asked("a")]):
        found = proxy.begin(chat(*messages))
        assert (found.by, found.confidence) == ("none", 0.0)
        assert found.rollout_id != first.rollout_id


def test_a_history_without_a_reply_of_ours_is_nobodys() -> None:
    proxy = Proxy()
    proxy.call(chat(asked("a"), said("example"), asked("b")), says("c"))
    assert proxy.begin(chat(asked("a"), said("example"), asked("b"))).by == "none"


def test_a_branch_from_an_earlier_point_is_of_the_same_rollout() -> None:
    proxy = Proxy()
    first = proxy.call(chat(asked("a")), says("b"))
    proxy.call(chat(asked("a"), said("b"), asked("c")), says("d"))
    branch = proxy.begin(chat(asked("a"), said("b"), asked("other")))
    forged = proxy.begin(chat(asked("a"), said("b"), asked("c"), said("never said"), asked("e")))
    assert branch.rollout_id == forged.rollout_id == first.rollout_id
    assert (branch.confidence, forged.confidence) == (WHOLE_SURE, PART_SURE)


def test_tool_call_ids_lead_back_however_the_history_was_changed() -> None:
    proxy = Proxy()
    first = proxy.call(chat(asked("a")), calls(UNIQUE, q=1))
    other = proxy.call(chat(asked("a")), calls(OTHER, q=1))
    for id_, owner in ((UNIQUE, first), (OTHER, other)):
        found = proxy.begin(chat(asked("summary of a"), calling(id_, q=1), result(id_)))
        assert (found.rollout_id, found.confidence) == (owner.rollout_id, BY_ID_SURE)


def test_counted_ids_lead_nowhere_and_the_history_decides() -> None:
    proxy = Proxy()
    one = proxy.call(chat(asked("a")), calls("functions.f:0"))
    other = proxy.call(chat(asked("b")), calls("functions.f:0"))
    for question, owner in (("a", one), ("b", other)):
        found = proxy.begin(chat(asked(question), calling("functions.f:0"), result("functions.f:0")))
        assert (found.rollout_id, found.confidence) == (owner.rollout_id, WHOLE_SURE)
    assert proxy.begin(chat(asked("c"), calling("functions.f:0"), result("functions.f:0"))).by == "none"


def test_an_id_that_two_rollouts_had_names_neither() -> None:
    proxy = Proxy()
    one = proxy.call(chat(asked("a")), calls(UNIQUE))
    proxy.call(chat(asked("b")), calls(UNIQUE))
    assert proxy.begin(chat(asked("a"), calling(UNIQUE), result(UNIQUE))).rollout_id == one.rollout_id
    assert proxy.begin(chat(asked("c"), calling(UNIQUE), result(UNIQUE))).by == "none"


def test_equal_histories_are_given_out_once_each_the_newest_first() -> None:
    proxy = Proxy()
    owners = [proxy.call(chat(asked("a")), says("b")).rollout_id for _ in range(3)]
    nexts = [proxy.begin(chat(asked("a"), said("b"), asked("c"))) for _ in range(4)]
    assert [found.rollout_id for found in nexts[:3]] == owners[::-1]
    assert {found.confidence for found in nexts[:3]} == {ONE_OF_SEVERAL_SURE}
    assert nexts[3].by == "none"


def test_an_abandoned_rollout_takes_nobodys_calls_while_the_next_one_has_its_own() -> None:
    proxy = Proxy()
    proxy.call(chat(asked("a")), says("b"))  # its agent ends here
    for _ in range(3):
        own = proxy.call(chat(asked("a")), says("b"))
        assert proxy.call(chat(asked("a"), said("b"), asked("c")), says("d")).rollout_id == own.rollout_id


def test_a_failed_call_gives_its_place_back() -> None:
    proxy = Proxy()
    owners = {proxy.call(chat(asked("a")), says("b")).rollout_id for _ in range(2)}
    follow = chat(asked("a"), said("b"), asked("c"))
    failed = proxy.begin(follow)
    end(failed, None)
    assert {proxy.begin(follow).rollout_id for _ in range(2)} == owners


def test_text_beside_a_tool_call_tells_equal_histories_apart_where_it_comes_back() -> None:
    proxy = Proxy()
    one = proxy.call(chat(asked("a")), calls(UNIQUE, "Let me look."))
    other = proxy.call(chat(asked("a")), calls(OTHER, "I will look."))
    rewritten = "call_0"
    for text, owner in (("Let me look.", one), ("I will look.", other)):
        found = proxy.begin(chat(asked("a"), calling(rewritten, text), result(rewritten)))
        assert (found.rollout_id, found.confidence) == (owner.rollout_id, WHOLE_SURE)


@pytest.mark.parametrize("name", ["user", "prompt_cache_key", "safety_identifier"])
def test_what_names_a_user_keeps_apart_and_never_joins(name: str) -> None:
    proxy = Proxy()
    ann = proxy.call(chat(asked("a"), **{name: "ann"}), says("b"))
    follow = [asked("a"), said("b"), asked("c")]
    assert proxy.begin(chat(*follow, **{name: "bob"})).by == "none"
    assert proxy.begin(chat(asked("other"), **{name: "ann"})).by == "none"
    assert proxy.begin(chat(*follow, **{name: "ann"})).rollout_id == ann.rollout_id


def test_each_choice_can_be_gone_on_from() -> None:
    proxy = Proxy()
    answer = {"choices": [{"message": said("b")}, {"message": said("c")}]}
    first = proxy.call(chat(asked("a"), n=2), answer)
    for text in ("b", "c"):
        assert proxy.begin(chat(asked("a"), said(text), asked("d"))).rollout_id == first.rollout_id


# -- other wires ----------------------------------------------------------------------------------


def test_a_responses_chain_is_followed_by_its_ids() -> None:
    proxy = Proxy(wire="responses")
    previous = "resp_0123456789abcdef0123"
    first = proxy.call({"input": "a"}, {"id": previous, "output": []})
    proxy.call({"input": "a"}, {"id": "resp_ffffffffffffffff0123", "output": []})
    second = proxy.call(
        {"input": "b", "previous_response_id": previous},
        {"id": "resp_00112233445566778899", "output": [{"type": "message", "id": "msg_0a1b2c3d4e5f6071"}]},
    )
    third = proxy.begin({"input": [{"type": "item_reference", "id": "msg_0a1b2c3d4e5f6071"}]})
    assert second.rollout_id == third.rollout_id == first.rollout_id
    assert second.confidence == BY_ID_SURE


def test_a_completions_prompt_that_extends_prompt_and_text_is_followed() -> None:
    proxy = Proxy(wire="completions")
    start = "Question: how many legs have two dogs?\nThought:"
    first = proxy.call({"prompt": start}, {"choices": [{"text": " I must count. "}]})
    for cut in (" I must count. ", " I must count."):
        found = proxy.begin({"prompt": start + cut + "\nObservation: 8\nThought:"})
        assert (found.rollout_id, found.confidence) == (first.rollout_id, WHOLE_SURE)
    assert proxy.begin({"prompt": start + " I guess.\nObservation: 8"}).by == "none"
    assert proxy.begin({"prompt": start}).by == "none"
    assert proxy.begin({"prompt": [1, 2, 3]}).by == "none"
    assert proxy.begin({"prompt": [start, start]}).by == "none"


def test_a_rewritten_prompt_is_followed_by_the_passage_of_the_reply_that_it_holds() -> None:
    proxy = Proxy()
    system = {"role": "system", "content": "Your input fields are: question, trajectory"}
    question = "[[ ## question ## ]]\nWhich of the two rivers is longer, the Rhine or the Elbe?\n"
    thoughts = ["I should look up the length of the Rhine first.", "The Elbe is what I look up first, then."]
    owners = [
        proxy.call(chat(system, asked(question)), says(f"[[ ## next_thought ## ]]\n{thought}\n"))
        for thought in thoughts
    ]
    for thought, owner in zip(thoughts, owners, strict=True):
        grown = f"{question}[[ ## trajectory ## ]]\n[[ ## thought_0 ## ]]\n{thought}\n"
        found = proxy.begin(chat(system, asked(grown)))
        assert (found.rollout_id, found.confidence) == (owner.rollout_id, REWRITTEN_SURE)
    both = question + "".join(thoughts)
    assert proxy.begin(chat(system, asked(both))).by == "none"
    judge = {"role": "system", "content": "You judge."}
    assert proxy.begin(chat(judge, asked(question + thoughts[0]))).by == "none"
    assert proxy.begin(chat(system, asked("Another question. " + thoughts[0]))).by == "none"


def test_calls_told_as_text_are_followed_by_the_ids_in_it() -> None:
    proxy = Proxy()
    first = proxy.call(chat(asked("a")), calls(UNIQUE))
    proxy.call(chat(asked("a")), calls(OTHER))
    told = said(f"Calling tools:\n[{{'id': '{UNIQUE}', 'type': 'function'}}]")
    found = proxy.begin(chat(asked("a"), told, asked("Observation:\n42")))
    assert (found.rollout_id, found.confidence) == (first.rollout_id, BY_ID_SURE)


# -- retries --------------------------------------------------------------------------------------


def test_a_marked_retry_is_of_the_rollout_of_the_try_before() -> None:
    proxy = Proxy()
    first = proxy.begin(chat(asked("a")))
    end(first, None)
    other = proxy.call(chat(asked("a")), says("b"))
    second = proxy.begin(chat(asked("a")), retry=1)
    assert (second.rollout_id, second.by, second.retry) == (first.rollout_id, "retry", 1)
    assert other.rollout_id != first.rollout_id
    end(second, None)
    third = proxy.call(chat(asked("a")), says("c"), retry=2)
    assert third.rollout_id == first.rollout_id
    assert proxy.begin(chat(asked("a"), said("c"), asked("d"))).rollout_id == first.rollout_id


def test_a_retry_of_an_answer_that_was_lost_on_its_way_is_of_the_same_rollout() -> None:
    proxy = Proxy()
    first = proxy.call(chat(asked("a")), says("b"))
    assert proxy.call(chat(asked("a")), says("b"), retry=1).rollout_id == first.rollout_id
    follow = proxy.begin(chat(asked("a"), said("b"), asked("c")))
    assert (follow.rollout_id, follow.confidence) == (first.rollout_id, WHOLE_SURE)


def test_a_retry_that_could_be_of_several_is_nobodys_unless_they_failed() -> None:
    proxy = Proxy()
    for _ in range(2):
        proxy.call(chat(asked("a")), says("b"))
    assert proxy.begin(chat(asked("a")), retry=1).by == "none"
    failed = [proxy.begin(chat(asked("x"))) for _ in range(2)]
    for found in failed:
        end(found, None)
    retries = [proxy.begin(chat(asked("x")), retry=1) for _ in range(2)]
    assert [found.rollout_id for found in retries] == [found.rollout_id for found in failed]
    assert retries[0].confidence == ONE_OF_SEVERAL_SURE


def test_a_retry_keeps_the_place_among_equal_histories() -> None:
    proxy = Proxy()
    owners = {proxy.call(chat(asked("a")), says("b")).rollout_id for _ in range(2)}
    follow = chat(asked("a"), said("b"), asked("c"))
    failed = proxy.begin(follow)
    end(failed, None)
    again = proxy.begin(follow, retry=1)
    assert again.rollout_id == failed.rollout_id
    assert {again.rollout_id, proxy.begin(follow).rollout_id} == owners


def test_only_an_equal_body_is_a_retry_and_only_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy()
    end(proxy.begin(chat(asked("a"))), None)
    assert proxy.begin(chat(asked("a"), temperature=1), retry=1).by == "none"
    assert proxy.begin(chat(asked("b")), retry=1).by == "none"
    later = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert proxy.begin(chat(asked("a")), retry=1).by == "none"


# -- limits and odd things --------------------------------------------------------------------------


def test_memory_is_bounded_and_the_oldest_is_forgotten() -> None:
    lineage = Lineage(most_calls=3)
    proxy = Proxy(lineage)
    for number in range(10):
        proxy.call(chat(asked(f"question {number}")), calls(f"call_{number}aB1cD2eF3gH4iJ5kL6"))
    assert len(lineage._by_key) == 3 * 2
    assert proxy.begin(chat(asked("question 9"), calling("x"), asked("c"))).by == "conversation"
    assert proxy.begin(chat(asked("question 0"), calling("x"), asked("c"))).by == "none"


def test_what_this_process_does_not_remember_is_asked_of_the_store_and_nothing_else() -> None:
    proxy = Proxy()
    lineage = proxy.lineage
    proxy.call(chat(asked("a")), says("b"))
    known = chat(asked("a"), said("b"), asked("c"))
    unknown = chat(asked("a"), said("b"), asked("c"), said("d"), asked("e"))
    assert not lineage.needs_store(lineage.place_of("chat", chat(asked("a"))))
    assert not lineage.needs_store(lineage.place_of("chat", known))
    assert lineage.needs_store(lineage.place_of("chat", unknown))
    linked = {"input": "b", "previous_response_id": "resp_0123456789abcdef0123"}
    assert lineage.needs_store(lineage.place_of("responses", linked))


def test_what_the_store_has_counts_as_if_it_had_been_seen() -> None:
    digest = end(Proxy().begin(chat(asked("a"))), calls(UNIQUE))
    ends = [
        ConversationEnd("r1", 1, digest, json.dumps(calls(UNIQUE)).encode(), False),
        ConversationEnd("r2", 2, digest, json.dumps(calls(OTHER)).encode(), True),
        ConversationEnd("r3", 1, digest, b"not json", True),
    ]
    proxy = Proxy()
    proxy.lineage.learn(ends)
    by_id = proxy.begin(chat(asked("a"), calling(OTHER), result(OTHER)))
    assert (by_id.rollout_id, by_id.attempt, by_id.confidence) == ("r2", 2, BY_ID_SURE)
    by_hash = proxy.begin(chat(asked("a"), calling("rewritten"), result("rewritten")))
    assert (by_hash.rollout_id, by_hash.confidence) == ("r1", ONE_OF_SEVERAL_SURE)
    proxy.lineage.learn(ends)  # again: r1 has been gone on from, and stays so
    assert proxy.begin(chat(asked("a"), calling("rewritten"), result("rewritten"))).by == "none"


@pytest.mark.parametrize(
    "request_",
    [{}, {"messages": 3}, {"messages": [3]}, {"messages": [{"role": [], "content": {}}]},
     {"messages": [{"role": "assistant", "tool_calls": "x"}]}, {"messages": None, "user": {}},
     {"messages": [{"role": "user", "content": [[]]}]}],
)  # fmt: skip
@pytest.mark.parametrize("wire", ["chat", "responses", "messages", "completions", "unheard-of"])
def test_odd_requests_and_answers_stand_alone(wire: str, request_: Json) -> None:
    proxy = Proxy(wire=wire)
    assert proxy.begin(request_).by == "none"
    found = proxy.begin(request_)
    assert found.strand is not None
    for answer in (b"", b"[]", b"3", b"{}", b'{"choices": [{"message": 3}]}', b'{"output": [1], "id": 2}'):
        found.strand.ended(answer)


# -- whatever happens ---------------------------------------------------------------------------------


def exact(message: Json, rng: random.Random) -> Json:
    return message


def respelt(message: Json, rng: random.Random) -> Json:
    """As LangChain, ADK and JavaScript's clients do it: arguments anew, nothing for null."""
    message = {**message, "refusal": None, "reasoning_content": "..."}
    if calls_ := message.pop("tool_calls", None):
        message["tool_calls"] = []
        for call in calls_:
            arguments = json.loads(call["function"]["arguments"])
            spelt = json.dumps(arguments, indent=rng.choice([None, 2]), sort_keys=True)
            message["tool_calls"].append({**call, "function": {"name": "f", "arguments": spelt}})
    if not message["content"]:
        message["content"] = rng.choice([None, ""])
    return message


def textless(message: Json, rng: random.Random) -> Json:
    """As CrewAI and Semantic Kernel: text beside a tool call is dropped."""
    return {**message, "content": None} if message.get("tool_calls") else message


def shortened(message: Json, rng: random.Random) -> Json:
    """As Agno: other ids."""
    renamed = [{**call, "id": f"call_{n}"} for n, call in enumerate(message.get("tool_calls", ()))]
    return {**message, "tool_calls": renamed} if renamed else message


STYLES = [exact, respelt, textless, shortened]


Told = tuple[str, list[Any], list[Any]]  # rollout, history, history with the reply


class Agent:
    """Carries out one task in its client's way, and may go back to any earlier point of it."""

    def __init__(self, task: str, style: Any, rng: random.Random, log: list[Told]) -> None:
        self.style, self.rng, self.log = style, rng, log
        self.histories: list[list[Json]] = [[{"role": "system", "content": "You help."}, asked(task)]]
        self.rollouts: set[str] = set()

    def step(self, proxy: Proxy, at: int, *, fails: bool) -> None:
        """One call from the history with this number, and what comes of it."""
        history = self.histories[at % len(self.histories)]
        request = chat(*history)
        found = proxy.begin(request)
        if fails:
            end(found, None)
            found = proxy.begin(request, retry=1)
        number = self.rng.randrange(2)
        if self.rng.random() < 0.5:
            id_ = f"chatcmpl-tool-{self.rng.getrandbits(128):032x}"
            reply = calling(id_, self.rng.choice([None, "Well."]), n=number)
            again = self.style(reply, self.rng)
            after = [again, *(result(call["id"], f"r{number}") for call in again["tool_calls"])]
        else:
            reply = said(f"answer {number}")
            after = [self.style(reply, self.rng), asked(f"go on {number}")]
        end(found, {"id": "x", "choices": [{"message": reply}]})
        self.histories.append([*history, *after])
        self.rollouts.add(found.rollout_id)
        self.log.append((found.rollout_id, _plain(history), _plain([*history, reply])))


moves = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.booleans()), min_size=1, max_size=40)


def play(agents: list[Agent], steps: list[tuple[int, int, bool]]) -> None:
    proxy = Proxy()
    for who, at, fails in steps:
        agent = agents[who % len(agents)]
        # A task is begun once; from then on it goes on, from anywhere.
        agent.step(
            proxy, 0 if len(agent.histories) == 1 else 1 + at % (len(agent.histories) - 1), fails=fails
        )


@given(moves, st.integers(0, 2**32), st.lists(st.sampled_from(STYLES), min_size=4, max_size=4))
def test_agents_with_tasks_of_their_own_get_one_rollout_each(
    steps: list[tuple[int, int, bool]], seed: int, styles: list[Any]
) -> None:
    rng = random.Random(seed)
    agents = [Agent(f"task {i}", styles[i], rng, []) for i in range(4)]
    play(agents, steps)
    rollouts = [agent.rollouts for agent in agents if agent.rollouts]
    assert all(len(own) == 1 for own in rollouts)
    assert len(set.union(*rollouts)) == len(rollouts)


@given(moves, st.integers(0, 2**32), st.sampled_from(STYLES))
def test_a_call_is_only_ever_put_where_its_history_is_even_if_all_agents_have_one_task(
    steps: list[tuple[int, int, bool]], seed: int, style: Any
) -> None:
    """With two answers in all, histories collide all the time. They may be swapped where equal."""
    rng, log = random.Random(seed), list[Told]()
    play([Agent("the task", style, rng, log) for _ in range(4)], steps)
    ends: dict[str, list[list[Any]]] = defaultdict(list)
    for rollout, history, with_reply in log:
        known = ends[rollout]
        assert not known or any(history[: len(end)] == end for end in known)
        known.append(with_reply)


def _plain(history: list[Json]) -> list[Any]:
    return [
        (m["role"], [json.loads(c["function"]["arguments"]) for c in m.get("tool_calls", ())] or m["content"])
        for m in history
    ]
