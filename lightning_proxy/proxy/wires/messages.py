"""Anthropic Messages: ``POST /v1/messages``.

vLLM tells no tokens on this API, and serves it by way of its own Chat Completions. So a request that
is understood to the last field goes there, asking for tokens, and the answer comes back as vLLM would
have put it; every other request goes to the engine's own Messages API, and is recorded as text.
"""

from __future__ import annotations

import json
import logging

import orjson

from .base import Json, Prepared, Wire, sampling_of
from .chat import ChatWire
from .messages_answer import MessagesTranslation
from .messages_native import NativeMessages
from .messages_request import NotTranslated, chat_request
from .translated import TranslatedCollector

log = logging.getLogger(__name__)
_CHAT = ChatWire()
_CHAT_PATH = "/v1/chat/completions"
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "max_tokens", "tool_choice")


class MessagesWire(Wire):
    """https://docs.anthropic.com/en/api/messages"""

    name = "messages"

    def prepare(self, body: bytes, request: Json, *, tokens: bool) -> Prepared:
        """See :class:`Wire`."""
        sampling = sampling_of(request, _SAMPLING_KEYS)
        if request.get("stop_sequences") is not None:
            sampling["stop"] = request["stop_sequences"]
        return (_translated(body, sampling) if tokens else None) or Prepared(body, NativeMessages(), sampling)


def _translated(body: bytes, sampling: Json) -> Prepared | None:
    try:
        # Python's own JSON, as in vLLM: integers of any length stay integers.
        chat = chat_request(json.loads(body))
        made = orjson.dumps(chat)
    except (NotTranslated, ValueError, TypeError, RecursionError) as why:
        log.debug("a Messages request stays as it is, and tells no tokens: %s", why)
        return None
    made, asked = _CHAT.ask(made, chat)
    collector = TranslatedCollector(_CHAT.collector(asked), MessagesTranslation())
    return Prepared(made, collector, sampling, _CHAT_PATH)
