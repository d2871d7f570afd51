"""Answers that somebody gave, as the tokens that the engine would have made of them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

from lightning_proxy.errors import TrainingError
from lightning_proxy.store import Span
from lightning_proxy.trainer.transitions import Reason

Json = dict[str, Any]
_STAND_IN: list[Json] = [{"role": "user", "content": "?"}]


class _Unrenderable(Exception):
    """The demonstration, or the conversation, has a form that no template is asked for."""


class TokenizerAnswers:
    """See ``Answers``."""

    def __init__(self, model: Path) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError) as error:
            raise TrainingError(f"demonstrations need the tokenizer of {model}: {error}") from error
        self._ends = _ends_of_turn(model, self._tokenizer.eos_token_id)
        if not self._ends:
            raise TrainingError(f"{model} names no token that ends an answer (eos_token_id)")

    def tokens(self, span: Span, demonstration: str | Mapping[str, Any]) -> array[int] | Reason:
        """See ``Answers.tokens``."""
        prompt = span.generations[0].prompt_token_ids
        try:
            if span.wire == "completions":
                return self._ended(_text(demonstration)) if _one_prompt(span) else Reason.UNRENDERABLE
            if span.wire == "chat":
                return self._in_conversation(json.loads(span.request), demonstration, prompt)
            return self._standing_alone(_text(demonstration), prompt)
        except (_Unrenderable, jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError):
            return Reason.UNRENDERABLE  # templates raise what they like

    def _in_conversation(
        self, request: Json, demonstration: str | Mapping[str, Any], prompt: array[int]
    ) -> array[int] | Reason:
        """As the template puts it after the call's own conversation, if that makes the call's own prompt."""
        messages = [_for_template(message) for message in request["messages"]]
        answer = _for_template(
            {"role": "assistant", "content": demonstration}
            if isinstance(demonstration, str)
            else dict(demonstration)
        )
        if answer["role"] != "assistant":
            raise _Unrenderable
        for options in _template_options(request):
            before = self._render(messages, add_generation_prompt=True, **options)
            if self._ids(before) == prompt:
                return self._rest(before, self._render([*messages, answer], **options))
        return Reason.PROMPT_DIFFERS

    def _standing_alone(self, text: str, prompt: array[int]) -> array[int] | Reason:
        """For APIs whose conversation is not the template's: after another one.

        What can be compared is how the call's prompt ends: with what the template begins an answer with.
        """
        asked = self._render(_STAND_IN)
        before = self._render(_STAND_IN, add_generation_prompt=True)
        beginning = self._ids(before.removeprefix(asked))
        if not before.startswith(asked) or not beginning or prompt[-len(beginning) :] != beginning:
            return Reason.PROMPT_DIFFERS
        return self._rest(before, self._render([*_STAND_IN, {"role": "assistant", "content": text}]))

    def _rest(self, before: str, whole: str) -> array[int]:
        if not whole.startswith(before):
            raise _Unrenderable
        return self._ended(whole.removeprefix(before))

    def _ended(self, text: str) -> array[int]:
        """The text's ids to the last that ends a turn, where the engine stops; one is added if needed."""
        ids = self._ids(text)
        last = max((place for place, token in enumerate(ids) if token in self._ends), default=None)
        return ids + array("i", [self._ends[0]]) if last is None else ids[: last + 1]

    def _render(self, messages: Sequence[Json], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options))

    def _ids(self, text: str) -> array[int]:
        return array("i", self._tokenizer.encode(text, add_special_tokens=False))


def _ends_of_turn(model: Path, of_tokenizer: int | None) -> list[int]:
    """Tokens that end an answer, the tokenizer's first: templates end turns with it where they can."""
    file = model / "generation_config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ends = [of_tokenizer, *(named if isinstance(named, list) else [named])]
    return [token for token in ends if token is not None]


def _one_prompt(span: Span) -> bool:
    return len({each.prompt_token_ids.tobytes() for each in span.generations}) == 1


def _template_options(request: Json) -> Iterator[Json]:
    """What the engine gives the template beside messages: tools as they are, or with known fields only."""
    options = dict(request.get("chat_template_kwargs") or {})
    tools = request.get("tools")
    if not tools or request.get("tool_choice") == "none":
        yield options
    if tools:
        yield options | {"tools": tools}
        yield options | {"tools": [_plain_tool(tool) for tool in tools]}


def _plain_tool(tool: Json) -> Json:
    function = tool["function"]
    fields = {name: function.get(name) for name in ("name", "description", "parameters")}
    return {"type": "function", "function": fields}


def _for_template(message: Mapping[str, Any]) -> Json:
    """A message of Chat Completions as templates expect it: text in one piece, arguments as an object."""
    made = dict(message)
    if isinstance(made.get("content"), list):
        made["content"] = "\n".join(_part(part) for part in made["content"])
    if calls := made.get("tool_calls"):
        made["tool_calls"] = [_for_template_call(call) for call in calls]
    return made


def _for_template_call(call: Json) -> Json:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        function["arguments"] = json.loads(function["arguments"] or "{}")
    return {**call, "function": function}


def _text(demonstration: str | Mapping[str, Any]) -> str:
    """A demonstration that is text and nothing else."""
    if isinstance(demonstration, str):
        return demonstration
    content = demonstration.get("content")
    if demonstration["role"] != "assistant" or demonstration.get("tool_calls"):
        raise _Unrenderable
    if isinstance(content, str):
        return content
    return "\n".join(_part(part) for part in content or ())


def _part(part: Mapping[str, Any]) -> str:
    if part.get("type") not in ("text", "output_text", "input_text"):
        raise _Unrenderable
    return str(part["text"])
