"""What becomes of a span of which something must not be kept.

1. Rules take it out of request and response. What they took, is taken out wherever else it stands in
   the span, and from then on in all calls of its rollout: an agent sends its history again, and a model
   repeats what it was told.
2. Token ids and logprobs of such a span go, for they would give the text back; how many there were
   stays, in its usage. Its fidelity is ``text`` at best.
3. So does the digest of its conversation: a phone number can be found out by trying all.
4. The span names the rules, so that whoever leaves it out can say why.

What the agent sends and gets is never touched: all of this happens to the record.
"""

from __future__ import annotations

import logging
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import orjson

from lightning_proxy.config import RedactionSettings
from lightning_proxy.errors import InvalidInput
from lightning_proxy.store import Fidelity, Generation, Span

from .inside import changed_inside, json_inside, names_twice, unescaped
from .paths import changed_at
from .rules import Rule

Json: TypeAlias = dict[str, Any]
log = logging.getLogger(__name__)

REDACTED = "[redacted]"  # in place of a text that cannot be searched
REPEATED = "repeated"  # in place of a rule's name: what a rule took out of an earlier call of the rollout
UNREAD = "unread"  # its tokens may say more than its texts do: a cut answer, a history that is elsewhere

_UNSEARCHABLE = (RecursionError, ValueError, TypeError)  # nested deeper than Python walks, or orjson writes
_SHORTEST_REPEATED = 4  # characters: what is shorter stands in other texts by chance
_MOST_ROLLOUTS = 2_000  # whose texts are remembered
_MOST_LETTERS = 65_536  # of them per rollout
_MOST_CLEAN = 50_000  # texts known to hold nothing, by their hashes
_SHORTEST_NUMBER = 10_000_000  # numbers below are not looked at: token ids, counts, sizes
# Where an answer holds its tokens, beside its text: in itself, its choices, its output's content.
_TOKEN_FIELDS = frozenset((
    "logprobs", "prompt_logprobs", "token_ids", "prompt_token_ids", "input_messages", "output_messages",
))  # fmt: skip
_NO_TEXT = frozenset(
    ("usage", "created", "created_at", "completed_at", "seed")
)  # counts and times: only their texts are looked at


class Redactor:
    """Applies rules to spans; to be used by one thread."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """Use :meth:`of`."""
        self._rules = tuple(rules)
        self._remembered: OrderedDict[str, Mapping[str, str]] = OrderedDict()
        self._scans: dict[tuple[int, ...], _Scan] = {}

    @staticmethod
    def of(settings: Sequence[RedactionSettings]) -> Redactor | None:
        """The rules of the settings; ``None`` where there are none. Raises ``ConfigError``."""
        return Redactor([Rule.of(one) for one in settings]) if settings else None

    def span(self, span: Span, request: Any = None) -> Span:
        """``span`` as it may be written; the same object where nothing had to go.

        ``request``: its body, parsed, where that has been done already. A span that cannot be looked
        through keeps nothing but its numbers.
        """
        try:
            return self._span(span, request)
        except _UNSEARCHABLE as error:
            log.warning("a span of rollout %s could not be redacted, and is kept without its texts: %r",
                        span.rollout_id, error)  # fmt: skip
            return replace(_without_texts(span), response_id=self._kept_id(span))

    def value(self, value: Any) -> Any:
        """Something that is no span (a comment, metadata), by the rules that are patterns for all roles.

        Raises ``InvalidInput`` where it is nested too deeply, itself or as JSON in its texts.
        """
        rules = [rule for rule in self._rules if rule.path is None and not rule.roles]
        try:
            return self._by_rules(rules, value, _Taken())
        except _UNSEARCHABLE as error:
            raise InvalidInput(f"nested too deeply for [[redaction]] to search it ({error})") from error

    def text(self, text: str) -> str:
        """A text that nobody waits for to be told about, by the same rules; never raises."""
        try:
            made: str = self.value(text)
        except InvalidInput as error:
            log.warning("a text is kept as %s: it is %s", REDACTED, error)
            return REDACTED
        return made

    def part(self, part: Json) -> Any:
        """A part of a request, with its place, by the rules of every role: nobody knows yet whose it is."""
        rules = [rule for rule in self._rules if rule.in_request]
        try:
            return self._by_rules(rules, part, _Taken())
        except _UNSEARCHABLE:
            return {}

    def _span(self, span: Span, request: Any) -> Span:
        rules = [rule for rule in self._rules if rule.is_for(span.role)]
        for_request = [rule for rule in rules if rule.in_request]
        for_response = [rule for rule in rules if rule.in_response]
        if not rules and span.rollout_id not in self._remembered:
            return span
        taken = _Taken()
        asked = request or _asked(span.request)
        answered = None if span.response is None else _answered(span.response)
        used = None if span.usage is None else {"usage": dict(span.usage)}
        patterns = [rule for rule in rules if rule.path is None]
        others = (span.sampling, span.error, span.model, span.response_id, used)
        given = (asked, answered, *others)
        rules_of = (for_request, for_response, *[patterns for _ in others])
        new = [self._by_rules(of, value, taken) for of, value in zip(rules_of, given, strict=True)]
        if texts := self._texts(span.rollout_id, taken):
            repeated = _Literals(texts, taken)
            new = [repeated.value(each) for each in new]
        twice = _twice(span.request, asked) if for_request or texts else False
        if (
            twice
            or ((for_response or texts) and _twice(span.response, answered))
            or (not taken.names and any(made is not value for made, value in zip(new, given, strict=True)))
        ):
            taken.names[UNREAD] = None  # of a name that stands twice the record keeps the last value
        new_asked, new_answered, sampling, error, model, response_id, used = new
        if for_request and isinstance(asked, dict) and _refers(asked):
            taken.names[UNREAD] = None
            if _is_ids(asked.get("prompt")):
                new_asked = {**new_asked, "prompt": for_request[0].replacement}
        if for_response and span.response is None and any(g.response_token_ids for g in span.generations):
            taken.names[UNREAD] = None
        if not taken.names:
            return span
        return replace(
            _without_token_data(span if used is None else replace(span, usage=used["usage"]), taken.names),
            request=span.request if new_asked is asked and not twice else _dumped(new_asked),
            response=None if span.response is None else _dumped(_bare_answer(new_answered)),
            sampling=sampling,
            error=error,
            model=model,
            response_id=response_id if response_id == span.response_id else None,
        )

    def _kept_id(self, span: Span) -> str | None:
        """The id of the answer of a span that cannot be looked through, where patterns leave it as it is."""
        rules = [rule for rule in self._rules if rule.is_for(span.role) and rule.path is None]
        try:
            taken = _Taken()
            made = self._by_rules(rules, span.response_id, taken)
            made = _Literals(self._remembered.get(span.rollout_id, {}), taken).value(made)
        except _UNSEARCHABLE:
            return None
        return span.response_id if made == span.response_id else None

    def _by_rules(self, rules: Sequence[Rule], value: Any, taken: _Taken) -> Any:
        if value is None:
            return value
        for rule in rules:
            if rule.path is not None:
                value = changed_at(value, rule.path, _at_path(rule, taken))
        patterns = [rule for rule in rules if rule.path is None]
        if not patterns:
            return value
        key = tuple(map(id, patterns))
        scan = self._scans.get(key)
        if scan is None:
            scan = self._scans[key] = _Scan(patterns)
        return scan.body(value, taken)

    def _texts(self, rollout_id: str, taken: _Taken) -> Mapping[str, str]:
        """What was taken out of this rollout so far, longest first, and what stands in its place."""
        before = self._remembered.get(rollout_id)
        if not taken.found:
            return before or {}
        texts = {**(before or {}), **taken.texts()}
        kept, letters = dict[str, str](), 0
        for text in sorted(texts, key=len):  # a long one, remembered or not, costs no short ones
            letters += len(text)
            if letters > _MOST_LETTERS:
                break
            kept[text] = texts[text]
        self._remembered[rollout_id] = _longest_first(kept)
        self._remembered.move_to_end(rollout_id)
        if len(self._remembered) > _MOST_ROLLOUTS:
            self._remembered.popitem(last=False)
        return _longest_first(texts)


def _longest_first(texts: Mapping[str, str]) -> Mapping[str, str]:
    return {text: texts[text] for text in sorted(texts, key=len, reverse=True)}


class _Taken:
    """What rules took out of one span, and which."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}  # in the order of their first find
        self.found: list[tuple[str, str]] = []  # texts, and what stands in their place

    def by(self, rule: Rule, found: Iterable[str]) -> None:
        """A rule took these texts out."""
        self.names[rule.name] = None
        self.found += [(text, rule.replacement) for text in found]

    def texts(self) -> Mapping[str, str]:
        """What may come again, in pieces that an agent that re-serialises JSON leaves as they are."""
        return {
            stripped: replacement
            for text, replacement in self.found
            for piece in (text, *_leaves(json_inside(text)))
            if len(stripped := piece.strip()) >= _SHORTEST_REPEATED and stripped != replacement
        }


def _at_path(rule: Rule, taken: _Taken) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        if value is None or value == rule.replacement:
            return value
        if rule.pattern is None:
            taken.by(rule, _leaves(value))
            return rule.replacement
        return _Scan([rule]).value(value, taken)

    return change


class _Scan:
    """Searches patterns in every text of a value, names of fields included.

    A text that held nothing is not searched again when it comes again, as all of a history does.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._clean: set[int] = set()
        self._clean_before: set[int] = set()

    def body(self, value: Any, taken: _Taken) -> Any:
        """A whole body: numbers at its top (a time, a seed), and in its counts, are no texts."""
        if not isinstance(value, dict):
            return self.value(value, taken)
        made = {self._text(key, taken): self._at_top(key, item, taken) for key, item in value.items()}
        same = all(a is b for a, b in zip(made, value, strict=False)) and len(made) == len(value)
        return value if same and all(made[key] is value[key] for key in value) else made

    def _at_top(self, key: str, item: Any, taken: _Taken) -> Any:
        return item if isinstance(item, int | float) else self.value(item, taken, key not in _NO_TEXT)

    def value(self, value: Any, taken: _Taken, numbers: bool = True) -> Any:
        """``value`` without what the rules find; the same object where they find nothing.

        ``numbers``: whether they are looked at as well.
        """
        if isinstance(value, str):
            return self._text(value, taken)
        if isinstance(value, dict):
            made = {self._text(key, taken): self.value(item, taken, numbers) for key, item in value.items()}
            same = all(a is b for a, b in zip(made, value, strict=False)) and len(made) == len(value)
            return value if same and all(made[key] is value[key] for key in value) else made
        if isinstance(value, list):
            items = [self.value(item, taken, numbers) for item in value]
            return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
        if numbers and type(value) is int and abs(value) >= _SHORTEST_NUMBER:
            return self._number(value, taken)
        return value

    def _text(self, text: str, taken: _Taken) -> str:
        mark = hash(text)
        if mark in self._clean or mark in self._clean_before:
            return text
        made = self._replaced(changed_inside(text, lambda inner: self.value(inner, taken)), taken)
        if (plain := unescaped(made)) != made and (new := self._replaced(plain, taken)) != plain:
            made = new
        if made is text or made == text:
            self._note_clean(mark)
            return text
        return made

    def _replaced(self, text: str, taken: _Taken) -> str:
        for rule in self._rules:
            found: list[str] = []
            text = rule.replaced(text, found)
            if found:
                taken.by(rule, found)
        return text

    def _number(self, number: int, taken: _Taken) -> Any:
        text = str(number)
        for rule in self._rules:
            if rule.pattern is not None and rule.pattern.fullmatch(text):
                found: list[str] = []
                made = rule.replaced(text, found)
                if found:
                    taken.by(rule, found)
                    return made
        return number

    def _note_clean(self, mark: int) -> None:
        """Two generations, so that what comes again and again stays known."""
        self._clean.add(mark)
        if len(self._clean) > _MOST_CLEAN:
            self._clean_before, self._clean = self._clean, set()


class _Literals:
    """Takes texts out that were taken out elsewhere, letter by letter."""

    def __init__(self, texts: Mapping[str, str], taken: _Taken) -> None:
        self._texts = texts
        self._taken = taken

    def value(self, value: Any) -> Any:
        """``value`` without them; the same object where they are not in it."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            made = {self._text(key): self.value(item) for key, item in value.items()}
            same = all(a is b for a, b in zip(made, value, strict=False)) and len(made) == len(value)
            return value if same and all(made[key] is value[key] for key in value) else made
        if isinstance(value, list):
            items = [self.value(item) for item in value]
            return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
        if type(value) is int and abs(value) >= _SHORTEST_NUMBER and str(value) in self._texts:
            return self._text(str(value))
        return value

    def _text(self, text: str) -> str:
        inner = changed_inside(text, self.value)
        made = self._replaced(inner)
        if (plain := unescaped(made)) != made and (new := self._replaced(plain)) != plain:
            made = new
        if made != inner and not self._taken.names:
            self._taken.names[REPEATED] = None
        return text if made == text else made

    def _replaced(self, text: str) -> str:
        for literal, replacement in self._texts.items():
            if literal in text:
                text = text.replace(literal, replacement)
        return text


# -- bodies and tokens -----------------------------------------------------------------------------


def _asked(body: bytes) -> Any:
    """A request as JSON. Raises ``ValueError`` where it is none: nobody could see what its escapes say."""
    return orjson.loads(body) if body else ""


def _answered(body: bytes) -> Any:
    """An answer as JSON, or as a text (an error page). Raises ``ValueError`` where it is neither.

    What is spelt as JSON but is none (lone surrogates, NaN) has escapes as well, and is no text.
    """
    try:
        return orjson.loads(body) if body else ""
    except orjson.JSONDecodeError:
        if body.lstrip()[:1] in (b"{", b"[", b'"'):
            raise
        return body.decode()


def _twice(body: bytes | None, value: Any) -> bool:
    """Whether a body that is JSON has two values of one name."""
    return body is not None and isinstance(value, dict | list) and names_twice(body, value)


def _dumped(value: Any) -> bytes:
    return value.encode("utf-8", "replace") if isinstance(value, str) else orjson.dumps(value)


def _leaves(value: Any) -> Iterator[str]:
    """The texts and numbers that a value consists of."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif type(value) is int:
        yield str(value)


def _without_token_data(span: Span, why: Iterable[str]) -> Span:
    """A span that says why it has lost its token ids, and how many there were."""
    return replace(
        span,
        generations=tuple(_without_ids(generation) for generation in span.generations),
        usage=span.usage if span.usage is not None else _counted(span.generations),
        fidelity=span.fidelity if span.fidelity is Fidelity.INCOMPLETE else Fidelity.TEXT,
        conversation=None,
        redacted=",".join(why),
    )


def _without_texts(span: Span) -> Span:
    return replace(
        _without_token_data(span, (UNREAD,)),
        request=b"{}",
        response=None if span.response is None else b"{}",
        error=None if span.error is None else REDACTED,
        model=None,
        sampling={},
    )


def _without_ids(generation: Generation) -> Generation:
    return Generation(array("i"), array("i"), array("f"), generation.finish_reason)


def _bare_answer(response: Any) -> Any:
    """An answer without the tokens and logprobs that the agent itself had asked for."""
    if not isinstance(response, dict):
        return response
    made = _bare(response)
    for name in ("choices", "output"):
        if isinstance(response.get(name), list):
            made[name] = [_bare(item) for item in response[name]]
    for item in made.get("output") or ():
        if isinstance(item, dict) and isinstance(item.get("content"), list):
            item["content"] = [_bare(part) for part in item["content"]]
    return made


def _bare(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    return {key: value for key, value in item.items() if key not in _TOKEN_FIELDS}


def _refers(request: Json) -> bool:
    """Whether the prompt holds more than the request says: a history that is kept elsewhere, or ids."""
    items = request.get("input")
    return (
        bool(request.get("previous_response_id") or request.get("conversation"))
        or _is_ids(request.get("prompt"))
        or (isinstance(items, list) and any(_is_reference(item) for item in items))
    )


def _is_reference(item: Any) -> bool:
    return isinstance(item, dict) and item.get("type") == "item_reference"


def _is_ids(prompt: Any) -> bool:
    """Whether a prompt is given as token ids, of which nobody can see what they say."""
    while isinstance(prompt, list) and prompt:
        prompt = prompt[0]
    return isinstance(prompt, int)


def _counted(generations: Sequence[Generation]) -> Mapping[str, Any] | None:
    """The usage that an engine would have told, where it told none."""
    if not generations:
        return None
    read = len(generations[0].prompt_token_ids)
    written = sum(len(generation.response_token_ids) for generation in generations)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
