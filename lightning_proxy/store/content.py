"""What calls said, stored once: a span's content, told by what an earlier span of its attempt said.

Pure functions, no SQL. A span's content lies in three pieces, so that each can be read without the others:

``response``
    The response's body, with the chain's first response at hand (zstd's patch-from): it has the same form.
``request``
    How many bytes the request's body has in common with the *base* at its beginning and at its end, and
    the rest. It is told with the end of what is in common, with what the base has in place of the rest,
    and with the base's response at hand: an answer comes back as a message of the next request, and what
    moved or was shortened costs a few bytes.
``tokens``
    For each generation how many of its prompt's ids it has in common with the base's prompt and response;
    the other ids, with the base's last ones at hand; and the logprobs. The second and later generations are
    told by the first one of their own span.

For a short span that costs more time than it saves room: what it does not have in common with its base lies
together in one frame, in ``request``.

The base is the one of the attempt's last spans with the most in common (:func:`best_base`). Where none
has much, a span is told by itself, and begins a chain: ``depth`` counts the spans that must be read before
it, ``chain`` the bytes of all of them and its own. Where reading one span would take much more than its
own size (:func:`_is_too_long`), a new chain begins, so that it costs in proportion to that; the copies
add at most about a quarter to the file. A 50-turn conversation of 60,000 tokens is one chain.

Everything comes back bit for bit. What is written here is read by later versions: a change of the layout
is a new value of the first byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import orjson
from backports import zstd

from lightning_proxy.errors import StoreError
from lightning_proxy.store.packing import pack_ids, pack_logprobs, unpack_ids, unpack_logprobs
from lightning_proxy.store.records import Generation, Span

_LONGEST_CHAIN = 200  # spans; each step copies the whole body once
_SHORT_CHAIN = 16  # spans; these many may always be read before one
_CHAIN_SIZE = 4  # times what the span would take by itself: what more may be read for it

# The first byte of each piece: each in a frame of its own, alone or with something at hand; or all in one.
_ALONE, _AT_HAND, _TOGETHER = 0, 1, 2
_REQUEST = struct.Struct("<BII")  # first byte; bytes in common with the base: at the beginning, at the end
_LENGTHS = struct.Struct("<II")  # only where all is together: bytes of the response, of the request's rest
_TOKENS = struct.Struct("<BHI")  # first byte, number of generations, bytes of the finish reasons as JSON
# Of each generation: ids in common, further ids of the prompt, ids of the response, logprobs.
_COUNTS = "IIII"

_LEVEL = 3
_LEVEL_AT_HAND = 5
_SHORT_BODY = 16384  # bytes of a request, or of its ids: longer ones are told with something at hand
_TEXT_AT_HAND = 65536  # bytes of what is in common
_IDS_AT_HAND = 32768  # bytes of the base's ids
_PARAMETER = zstd.CompressionParameter
_LONG = 2**20  # bytes, both bodies together; from here on level 3 does not find all of what is alike
_LARGEST_WINDOW_LOG = 31
_SHORTEST_PREFIX = 8  # bytes that zstd wants at least
_DECODING: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _LARGEST_WINDOW_LOG}
# Kept, for making one costs more than compressing a small body. One call of compress() is a whole frame, and
# the object lets in one thread at a time.
_FIRST_BYTE = (b"\0", b"\1", b"\2")
_compressor = zstd.ZstdCompressor(level=_LEVEL)
_FRAME: Final = zstd.ZstdCompressor.FLUSH_FRAME


@dataclass(frozen=True, slots=True)
class First:
    """The first of a chain: its response shows what the others look like."""

    span_id: int
    response: bytes


@dataclass(slots=True)
class Content:
    """What a span said, as another one is told by it."""

    request: bytes
    response: bytes  # empty where there is none
    ids: bytes  # of the first generation's prompt and response, int32 little-endian
    depth: int = 0  # how many spans are read before it
    chain: int = 0  # bytes that are read for it
    span_id: int = 0  # 0 until it is stored
    root: First | None = None  # of its chain; None: this is it

    @property
    def size(self) -> int:
        """Bytes that it holds in memory."""
        return len(self.request) + len(self.response) + len(self.ids)


@dataclass(slots=True)
class Shared:
    """What a span has in common with a possible base."""

    head: int  # bytes at the beginning of the request
    tail: int  # bytes at its end, none of them counted in ``head``
    ids: int  # at the beginning of the first generation's prompt and response


_NOTHING = Shared(0, 0, 0)


@dataclass(slots=True)
class Encoded:
    """A span's content as it is stored."""

    response: bytes | None
    request: bytes
    tokens: bytes | None  # None: it has no generations

    @property
    def size(self) -> int:
        """Bytes that are read for it beside its base."""
        return len(self.response or b"") + len(self.request) + len(self.tokens or b"")


# -- choosing a base --------------------------------------------------------------------------------


def content_of(span: Span) -> Content:
    """What a span says. Raises ``TypeError`` for token ids in arrays of another type."""
    return Content(span.request, span.response or b"", leading_ids(span.generations))


def first_of(content: Content) -> First:
    """The first of the chain that it is in."""
    return content.root or First(content.span_id, content.response)


def leading_ids(generations: Sequence[Generation]) -> bytes:
    """The ids of the first generation's prompt and response, packed; none where there is none."""
    if not generations:
        return b""
    first = generations[0]
    return pack_ids(first.prompt_token_ids) + pack_ids(first.response_token_ids)


def best_base(new: Content, known: Iterable[Content]) -> tuple[Content | None, Shared]:
    """Which of the known contents, newest first, to tell a new one by, and what they have in common.

    The one with the most bytes in common. ``None`` where that is not worth a reference, or the chain is long.
    """
    best, best_shared, most = None, _NOTHING, 0
    short = _is_short(new)
    for content in known:
        # A short span that begins differently is told by itself as well as by another.
        if short and not _begin_alike(new, content):
            continue
        shared = _shared(new, content)
        count = shared.head + shared.tail + 4 * shared.ids
        if count > most:
            best, best_shared, most = content, shared, count
            if extends(content, shared):  # no other can have more
                break
    if best is None or _is_too_long(best, new):
        return None, _NOTHING
    return best, best_shared


def _begin_alike(new: Content, base: Content) -> bool:
    """Whether an eighth of the body, or of the ids, is the same at the beginning."""
    body, ids = len(new.request) // 8, len(new.ids) // 8
    return new.request.startswith(base.request[:body]) or (ids > 0 and new.ids.startswith(base.ids[:ids]))


def _is_short(new: Content) -> bool:
    return len(new.request) < _SHORT_BODY and len(new.ids) < _SHORT_BODY


def _is_too_long(base: Content, new: Content) -> bool:
    """Whether the chain up to ``base`` is too long to tell ``new`` by it."""
    alone = new.size // 3  # about what it takes by itself
    deep = base.depth >= _SHORT_CHAIN and base.chain > _CHAIN_SIZE * alone
    return deep or base.depth >= _LONGEST_CHAIN


def extends(base: Content, shared: Shared) -> bool:
    """Whether a span with that much in common holds all that the base's request held."""
    return shared.head + shared.tail >= len(base.request)


def _shared(new: Content, base: Content) -> Shared:
    a, b = new.request, base.request
    head = _common_head(a, b)
    tail = _common_tail(a, b, min(len(a), len(b)) - head)
    return Shared(head, tail, _common_head(new.ids, base.ids) // 4)


def _common_head(a: bytes, b: bytes) -> int:
    """How many bytes ``a`` and ``b`` have in common at their beginning.

    Slices are compared, in steps that double and then halve: a few passes of memcmp over what is in common.
    """
    if len(a) < len(b):
        a, b = b, a
    if a.startswith(b):
        return len(b)
    low, step = 0, 64
    while a[low : low + step] == b[low : low + step]:  # ends: they differ before the end of `b`
        low += step
        step *= 2
    while step > 1:  # they differ in the `step` bytes from `low` on
        step //= 2
        if a[low : low + step] == b[low : low + step]:
            low += step
    return low


def _common_tail(a: bytes, b: bytes, limit: int) -> int:
    """The same at their end, at most ``limit`` bytes."""
    low, step = 0, 64
    end_a, end_b = len(a), len(b)
    while low < limit:
        step = min(step, limit - low)
        if a[end_a - low - step : end_a - low] != b[end_b - low - step : end_b - low]:
            break
        low += step
        step *= 2
    else:
        return limit
    while step > 1:
        half = step // 2
        if a[end_a - low - half : end_a - low] == b[end_b - low - half : end_b - low]:
            low += half
            step -= half
        else:
            step = half
    return low


# -- encoding ---------------------------------------------------------------------------------------


def encode(span: Span, new: Content, base: Content | None, shared: Shared) -> Encoded:
    """A span's content (``new``), told by ``base`` with what :func:`best_base` found in common.

    Raises ``TypeError`` for token ids and logprobs in arrays of other types.
    """
    head, tail = shared.head, shared.tail
    rest = new.request[head : len(new.request) - tail]
    kind = _TOGETHER if _is_short(new) else _ALONE if base is None else _AT_HAND
    in_prompt = len(span.generations[0].prompt_token_ids) if span.generations else 0
    ids_shared = min(shared.ids, in_prompt)
    described, numbers = _describe_tokens(kind, span.generations, new, ids_shared)
    answered = span.response is not None
    if kind == _TOGETHER:
        lengths = _LENGTHS.pack(len(new.response), len(rest))
        told = _compressed(new.response + rest + numbers)
        request = _REQUEST.pack(kind, head, tail) + lengths + told
        return Encoded(_FIRST_BYTE[kind] if answered else None, request, described)
    pattern = text = ids = b""
    if base is not None:
        pattern = first_of(base).response
        text = _text_at_hand(base, head, tail)
        ids = _ids_at_hand(base, ids_shared)
    return Encoded(
        response=_FIRST_BYTE[kind] + _compressed(new.response, pattern) if answered else None,
        request=_REQUEST.pack(kind, head, tail) + _compressed(rest, text),
        tokens=None if described is None else described + _compressed(numbers, ids),
    )


def _describe_tokens(
    kind: int, generations: Sequence[Generation], new: Content, shared: int
) -> tuple[bytes | None, bytes]:
    """What ``tokens`` begins with, and the numbers that are to be compressed."""
    if not generations:
        return None, b""
    first = generations[0]
    counts = [
        shared,
        len(first.prompt_token_ids) - shared,
        len(first.response_token_ids),
        len(first.logprobs),
    ]
    ids, logprobs = new.ids[4 * shared :], pack_logprobs(first.logprobs)
    for generation in generations[1:]:
        prompt, response = pack_ids(generation.prompt_token_ids), pack_ids(generation.response_token_ids)
        again = _common_head(prompt, new.ids) // 4
        counts += (again, len(prompt) // 4 - again, len(response) // 4, len(generation.logprobs))
        ids += prompt[4 * again :] + response
        logprobs += pack_logprobs(generation.logprobs)
    reasons = orjson.dumps([generation.finish_reason for generation in generations])
    header = _TOKENS.pack(kind, len(generations), len(reasons))
    return header + struct.pack(f"<{len(counts)}I", *counts) + reasons, _planes(ids) + _planes(logprobs)


def _text_at_hand(base: Content, head: int, tail: int) -> bytes:
    return base.request[max(0, head - _TEXT_AT_HAND) : len(base.request) - tail] + base.response


def _ids_at_hand(base: Content, shared: int) -> bytes:
    """The base's ids from some way before the place on where the new ones differ."""
    return _planes(base.ids[max(0, 4 * shared - _IDS_AT_HAND) :])


def _planes(packed: bytes) -> bytes:
    """The lower halves of all 4-byte numbers, then their third bytes, then their fourth, which are alike.

    Two bytes tell most ids of a vocabulary apart, so that words that come again are seen to.
    """
    lower = bytearray(len(packed) // 2)
    lower[0::2] = packed[0::4]
    lower[1::2] = packed[1::4]
    return bytes(lower) + packed[2::4] + packed[3::4]


def _compressed(data: bytes, at_hand: bytes = b"") -> bytes:
    """A frame of zstd; nothing for nothing. ``at_hand``: what the reader will have too."""
    if not data:
        return b""
    size = len(data) + len(at_hand)
    if not at_hand and size <= _LONG:
        return _compressor.compress(data, _FRAME)
    options: dict[int, int] = {_PARAMETER.compression_level: _LEVEL_AT_HAND if at_hand else _LEVEL}
    if size > _LONG:
        options[_PARAMETER.window_log] = min(size.bit_length(), _LARGEST_WINDOW_LOG)
        options[_PARAMETER.enable_long_distance_matching] = 1
    prefix = zstd.ZstdDict(at_hand, is_raw=True).as_prefix if len(at_hand) >= _SHORTEST_PREFIX else None
    return zstd.ZstdCompressor(options=options, zstd_dict=prefix).compress(data, _FRAME)


# -- decoding ---------------------------------------------------------------------------------------


def decode(encoded: Encoded, base: Content | None) -> tuple[bytes, bytes | None, tuple[Generation, ...]]:
    """Request, response and generations; ``base``: the span that they were told by, ``None`` for none.

    Where ``encoded.tokens`` is ``None``, there are no generations.
    """
    kind, head, tail = _REQUEST.unpack_from(encoded.request)
    at_hand = base if kind == _AT_HAND else None
    if kind == _TOGETHER:
        response, rest, numbers = _taken_apart(encoded.request)
    else:
        response = b"" if encoded.response is None else _decode_response(encoded.response, base)
        text = b"" if at_hand is None else _text_at_hand(at_hand, head, tail)
        rest, numbers = _decompressed(encoded.request[_REQUEST.size :], text), None
    if base is not None:
        rest = b"".join((base.request[:head], rest, base.request[len(base.request) - tail :]))
    generations = () if encoded.tokens is None else _decode_tokens(encoded.tokens, numbers, base)
    return rest, None if encoded.response is None else response, generations


def decode_response(response: bytes, request: bytes, first: bytes) -> bytes:
    """A response's body, of these pieces; ``first``: the first response of its chain."""
    if response[0] == _TOGETHER:
        return _taken_apart(request)[0]
    return _decompressed(response[1:], first if response[0] == _AT_HAND else b"")


def _decode_response(data: bytes, base: Content | None) -> bytes:
    return decode_response(data, b"", b"" if base is None else first_of(base).response)


def _taken_apart(request: bytes) -> tuple[bytes, bytes, bytes]:
    """Response, rest of the request, and numbers, where all lies together."""
    response, rest = _LENGTHS.unpack_from(request, _REQUEST.size)
    told = _decompressed(request[_REQUEST.size + _LENGTHS.size :])
    return told[:response], told[response : response + rest], told[response + rest :]


def _decode_tokens(data: bytes, numbers: bytes | None, base: Content | None) -> tuple[Generation, ...]:
    """Generations; ``numbers`` where they did not lie in ``data``."""
    kind, number, said = _TOKENS.unpack_from(data)
    counts = struct.unpack_from("<" + number * _COUNTS, data, _TOKENS.size)
    told = _TOKENS.size + 4 * len(counts)
    reasons = orjson.loads(data[told : told + said])
    shared_with = b"" if base is None else base.ids
    if numbers is None:
        at_hand = b"" if base is None or kind != _AT_HAND else _ids_at_hand(base, counts[0])
        numbers = _decompressed(data[told + said :], at_hand)
    size = 4 * sum(counts[1::4]) + 4 * sum(counts[2::4])
    ids, logprobs = _from_planes(numbers[:size]), _from_planes(numbers[size:])
    generations: list[Generation] = []
    at, at_logprob = 0, 0
    for which in range(number):
        shared, prompt, response, count = (4 * n for n in counts[4 * which : 4 * which + 4])
        middle, end = at + prompt, at + prompt + response
        generation = Generation(
            prompt_token_ids=unpack_ids(shared_with[:shared] + ids[at:middle]),
            response_token_ids=unpack_ids(ids[middle:end]),
            logprobs=unpack_logprobs(logprobs[at_logprob : at_logprob + count]),
            finish_reason=reasons[which],
        )
        generations.append(generation)
        at, at_logprob = end, at_logprob + count
        if which == 0 and number > 1:
            shared_with = leading_ids(generations)
    return tuple(generations)


def _from_planes(planes: bytes) -> bytes:
    half, quarter = len(planes) // 2, len(planes) // 4
    packed = bytearray(len(planes))
    packed[0::4] = planes[0:half:2]
    packed[1::4] = planes[1:half:2]
    packed[2::4] = planes[half : half + quarter]
    packed[3::4] = planes[half + quarter :]
    return bytes(packed)


def _decompressed(data: bytes, at_hand: bytes = b"") -> bytes:
    if not data:
        return b""
    prefix = zstd.ZstdDict(at_hand, is_raw=True).as_prefix if len(at_hand) >= _SHORTEST_PREFIX else None
    try:
        return zstd.decompress(data, zstd_dict=prefix, options=_DECODING)
    except zstd.ZstdError as error:
        raise StoreError(f"content in the database cannot be read: {error}") from error
