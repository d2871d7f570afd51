"""The made-up model: what it reads, writes and how sure it is, all computable in advance.

Tokens are groups of ``bytes_per_token`` bytes of UTF-8. The chat template is ChatML-like and
tokenises every piece by itself, so that the prompt of a next turn starts with the prompt and the
answer of the one before, as with a well-behaved real template.
"""

from __future__ import annotations

import codecs
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index as as_index
from pathlib import Path
from struct import pack
from typing import Any

BOS = 1  # starts a message
EOS = 2  # ends a message, and an answer that stopped by itself
_BYTE_IDS = 3  # id of byte 0, where a token is one byte
_GROUP_IDS = 300  # lowest id of a token of several bytes


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token and the text that it added (empty within a character)."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer: its text as a client sees it, and the tokens that it is made of."""

    steps: tuple[Step, ...]
    finish_reason: str
    content: str | None
    tool_calls: tuple[Mapping[str, str], ...] = ()  # {"id", "name", "arguments"}

    @property
    def token_ids(self) -> list[int]:
        return [step.token_id for step in self.steps]

    @property
    def logprobs(self) -> list[float]:
        return [step.logprob for step in self.steps]


@dataclass(frozen=True, slots=True)
class Reply:
    """Everything the engine makes of one request."""

    prompt_token_ids: tuple[int, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """How long answers are, how coarse tokens are, and which weights are loaded."""

    tokens: int = 64  # length of an answer, its end token included
    bytes_per_token: int = 1
    weights: int = 0  # stands for the weights: another number, other logprobs

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a piece of text."""
        return _encode(text, self.bytes_per_token)

    def logprob(self, position: int, token_id: int, weights: int | None = None) -> float:
        """Logprob of a token at a position of prompt + answer, between -2 and 0."""
        seed = self.weights if weights is None else weights
        return -(1 + zlib.crc32(pack("<qqq", seed, position, token_id)) % 20_000) / 10_000

    def prompt_ids(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        """What the model reads for a Chat Completions or Completions request."""
        if "messages" in body:
            return self._chat_prompt(body["messages"], body.get("tools"))
        prompt = body.get("prompt", "")
        return self.encode(prompt) if isinstance(prompt, str) else tuple(map(as_index, prompt))

    def generate(
        self,
        body: Mapping[str, Any],
        *,
        text: str | None = None,
        tool_calls: Sequence[tuple[str, str]] = (),
        tokens: int | None = None,
        switches: Sequence[tuple[int, int]] = (),
    ) -> Reply:
        """The answer to ``body``, or to ``text`` / ``tool_calls`` where a script prescribes it.

        ``switches`` are (step, weights): from that step on, logprobs are those of these weights.
        """
        prompt = self.prompt_ids(body)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 1_000_000
        choices = []
        for index in range(body.get("n") or 1):
            calls = tuple(
                {"id": _call_id(prompt, index, i), "name": name, "arguments": arguments}
                for i, (name, arguments) in enumerate(tool_calls)
            )
            content = text
            if text is None and not calls:
                length = (tokens or self.tokens) - 1
                content = _letters(zlib.crc32(repr((prompt, index)).encode()), length * self.bytes_per_token)
            written = (content or "") + "".join(_hermes(c["name"], c["arguments"]) for c in calls)
            steps, finish = self._steps(prompt, written, limit, switches)
            if finish == "length" and calls:
                calls, content = (), "".join(step.text for step in steps)
            elif finish == "length":
                content = "".join(step.text for step in steps)
            choices.append(Choice(steps, "tool_calls" if calls else finish, content, calls))
        return Reply(prompt, tuple(choices))

    def _steps(
        self, prompt: Sequence[int], text: str, limit: int, switches: Sequence[tuple[int, int]]
    ) -> tuple[tuple[Step, ...], str]:
        ids = (*self.encode(text), EOS)
        finish = "stop" if len(ids) <= limit else "length"
        raw, size = text.encode(), self.bytes_per_token
        decoder = codecs.getincrementaldecoder("utf-8")()
        steps = []
        for i, token_id in enumerate(ids[:limit]):
            weights = self.weights
            for start, changed in switches:
                weights = changed if i >= start else weights
            piece = decoder.decode(raw[i * size : (i + 1) * size])
            steps.append(Step(token_id, piece, self.logprob(len(prompt) + i, token_id, weights)))
        return tuple(steps), finish

    def _chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: object) -> tuple[int, ...]:
        ids: list[int] = []
        if tools:
            ids += [BOS, *self.encode("tools\n"), *self.encode(json.dumps(tools)), EOS, *self.encode("\n")]
        for message in messages:
            ids += [BOS, *self.encode(f"{message['role']}\n"), *self.encode(_flat(message)), EOS]
            ids += self.encode("\n")
        ids += [BOS, *self.encode("assistant\n")]
        return tuple(ids)


def weights_of(directory: Path) -> int:
    """The number that stands for the weights in a directory: a checksum of its weight files.

    Raises ``FileNotFoundError`` where there are none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {directory}")
    checksum = 0
    for file in files:
        checksum = zlib.crc32(file.read_bytes(), checksum)
    return checksum


@lru_cache(maxsize=4096)
def _encode(text: str, size: int) -> tuple[int, ...]:
    raw = text.encode()
    if size == 1:
        return tuple(_BYTE_IDS + byte for byte in raw)
    return tuple(_GROUP_IDS + zlib.crc32(raw[i : i + size]) % 150_000 for i in range(0, len(raw), size))


def _flat(message: Mapping[str, Any]) -> str:
    """A message's text as the template writes it."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    calls = (call["function"] for call in message.get("tool_calls") or ())
    return content + "".join(_hermes(f["name"], f["arguments"]) for f in calls)


def _hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'


def _call_id(prompt: Sequence[int], index: int, number: int) -> str:
    # vLLM's are 46 characters long, which some clients shorten: keep that.
    seed = repr((tuple(prompt), index, number)).encode()
    return f"chatcmpl-tool-{zlib.crc32(seed):016x}{zlib.adler32(seed):016x}"


def _letters(seed: int, length: int) -> str:
    letters = []
    for _ in range(length):
        seed = (seed * 1_103_515_245 + 12_345) & 0x7FFFFFFF
        letters.append("etaoinshrdlu   "[(seed >> 16) % 15])
    return "".join(letters)
