"""Demonstrations in the model's own tokens, against the template's own tokenising."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lightning_proxy.demo
from lightning_proxy.store import Generation, Span
from lightning_proxy.trainer.backend import Answers, open_answers
from tests.trainer.recording import span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

MODEL = Path(lightning_proxy.demo.__file__).with_name("weights")
ARGUMENTS = {"query": "SELECT max(price) FROM items"}
CALL = {"function": {"name": "sql", "arguments": json.dumps(ARGUMENTS)}, "type": "function", "id": "c1"}
TOOL = {"type": "function", "function": {"name": "sql", "description": "Run a query."}}
ASKED: list[dict[str, Any]] = [
    {"role": "system", "content": "items(price, stock)"},
    {"role": "user", "content": [{"type": "text", "text": "What is the highest price?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "9"},
]
AS_TEMPLATES_HAVE_IT: list[dict[str, Any]] = [
    ASKED[0],
    {"role": "user", "content": "What is the highest price?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "sql", "arguments": ARGUMENTS}}],
    },
    ASKED[3],
]


@pytest.fixture(scope="module")
def answers() -> Answers:
    return open_answers(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL)
    return made


def call(prompt: list[int], body: dict[str, Any], wire: str = "chat") -> Span:
    made = Generation(array("i", prompt), array("i", [3]), array("f", [-1.0]))
    return span("a", made, wire=wire, request=json.dumps(body).encode())


def rendered(tokenizer: Any, messages: list[dict[str, Any]], *, asks: bool, **options: Any) -> list[int]:
    found = tokenizer.apply_chat_template(
        messages, add_generation_prompt=asks, return_dict=False, tokenize=True, **options
    )
    return list(found)


@pytest.mark.parametrize(
    ("demonstration", "as_a_message"),
    [
        ("It is 9.", {"role": "assistant", "content": "It is 9."}),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "It is 9."}]},
            {"role": "assistant", "content": "It is 9."},
        ),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, AS_TEMPLATES_HAVE_IT[2]),
    ],
    ids=["a text", "a message", "a tool call"],
)
def test_an_answer_stands_where_the_engines_would_and_ends_its_turn(
    answers: Answers, tokenizer: Any, demonstration: Any, as_a_message: dict[str, Any]
) -> None:
    prompt = rendered(tokenizer, AS_TEMPLATES_HAVE_IT, asks=True, tools=[TOOL])
    whole = rendered(tokenizer, [*AS_TEMPLATES_HAVE_IT, as_a_message], asks=False, tools=[TOOL])
    found = answers.tokens(call(prompt, {"messages": ASKED, "tools": [TOOL]}), demonstration)
    assert isinstance(found, array)
    assert found[-1] == tokenizer.eos_token_id
    assert whole == [*prompt, *found, *tokenizer.encode("\n")]


def test_a_prompt_that_the_template_does_not_make_is_refused(answers: Answers, tokenizer: Any) -> None:
    other = rendered(tokenizer, AS_TEMPLATES_HAVE_IT, asks=True)  # without the tools that the call had
    assert answers.tokens(call(other, {"messages": ASKED, "tools": [TOOL]}), "It is 9.") == "prompt_differs"
    assert isinstance(
        answers.tokens(call(other, {"messages": ASKED, "tools": [TOOL], "tool_choice": "none"}), "9"), array
    )


def test_a_completion_is_its_text_and_the_end_of_text(answers: Answers, tokenizer: Any) -> None:
    found = answers.tokens(call([5, 6], {"prompt": "xy"}, "completions"), "max price")
    assert list(found) == [*tokenizer.encode("max price"), tokenizer.eos_token_id]


@pytest.mark.parametrize("wire", ["responses", "messages"])
def test_a_text_for_another_api_needs_a_prompt_that_ends_as_one_for_an_answer(
    answers: Answers, tokenizer: Any, wire: str
) -> None:
    prompt = rendered(tokenizer, AS_TEMPLATES_HAVE_IT, asks=True)
    found = answers.tokens(call(prompt, {}, wire), {"role": "assistant", "content": "It is 9."})
    assert list(found) == [*tokenizer.encode("It is 9."), tokenizer.eos_token_id]
    assert answers.tokens(call(prompt[:-1], {}, wire), "It is 9.") == "prompt_differs"


@pytest.mark.parametrize(
    ("wire", "body", "demonstration"),
    [
        ("chat", {"messages": ASKED}, {"role": "user", "content": "9"}),
        ("chat", {"prompt": "no chat at all"}, "9"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "9"),
        ("completions", {}, {"role": "assistant", "tool_calls": [CALL]}),
        ("messages", {}, {"role": "assistant", "content": [{"type": "tool_use"}]}),
    ],
)
def test_what_no_template_can_put_into_tokens_is_unrenderable(
    answers: Answers, wire: str, body: dict[str, Any], demonstration: Any
) -> None:
    assert answers.tokens(call([1, 2], body, wire), demonstration) == "unrenderable"


def test_a_tokenizer_without_a_template_renders_no_conversation(tiny_model: Path) -> None:
    bare = open_answers(tiny_model)
    assert bare.tokens(call([1, 2], {"messages": ASKED}), "w5") == "unrenderable"
    assert list(bare.tokens(call([1, 2], {}, "completions"), "w5 w6")) == [5, 6, 1]
