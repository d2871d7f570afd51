"""Server-sent events, cut anywhere."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from lightning_proxy.proxy.sse import Event, SseParser, encode_event

# Bytes of which line ends, fields and comments are made, so that odd meetings of them are common.
STREAMS = st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"data: x", b"data:", b":c", b"id: 1", b"\xc3"]))
LINES = st.lists(
    st.one_of(
        st.binary(max_size=8).map(lambda value: b"data: " + clean(value)),
        st.binary(max_size=8).map(lambda value: b"data:" + clean(value)),
        st.sampled_from([b": keep-alive", b":", b"event: done", b"id: 7", b"data", b"database: 1"]),
    ),
    min_size=1,
    max_size=4,
)


def clean(value: bytes) -> bytes:
    return value.replace(b"\r", b"").replace(b"\n", b"")


def parsed(pieces: list[bytes]) -> tuple[list[Event], bytes]:
    parser = SseParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events, parser.rest()


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


@given(STREAMS.map(b"".join), st.lists(st.integers(0, 10_000)))
def test_no_byte_is_lost_or_moved_wherever_the_stream_is_cut(stream: bytes, places: list[int]) -> None:
    events, rest = parsed(cut(stream, places))
    assert b"".join(event.raw for event in events) + rest == stream


@given(
    st.lists(LINES, max_size=5),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.lists(st.integers(0, 10_000)),
)
def test_events_are_those_of_the_standard_wherever_the_stream_is_cut(
    events: list[list[bytes]], line_end: bytes, places: list[int]
) -> None:
    stream = b"".join(line_end.join(lines) + line_end + line_end for lines in events)
    found, rest = parsed(cut(stream, places))
    assert rest == b""
    assert [event.data for event in found] == [data_of(lines) for lines in events]


def data_of(lines: list[bytes]) -> bytes | None:
    """What the standard says: values of the data fields, one leading space each taken off."""
    values = [line[5:] for line in lines if line.startswith(b"data:")]
    return b"\n".join(value.removeprefix(b" ") for value in values) if values else None


def test_bytewise_events_come_as_soon_as_they_are_complete() -> None:
    parser = SseParser()
    stream = b"data: a\n\n: ping\r\n\r\ndata: b\ndata: c\r\r"
    found = [(i, event.data) for i in range(len(stream)) for event in parser.feed(stream[i : i + 1])]
    assert found == [(8, b"a"), (18, None), (len(stream) - 1, b"b\nc")]


def test_an_encoded_event_parses_to_its_data() -> None:
    assert parsed([encode_event(b'{"a": 1}')])[0] == [Event(b'data: {"a": 1}\n\n', b'{"a": 1}')]


def test_a_large_event_may_come_in_many_pieces() -> None:
    data = b"x" * 2**20
    events, rest = parsed(cut(b"data: " + data + b"\n\ndata: y\n\n", list(range(0, 2**20, 4096))))
    assert ([event.data for event in events], rest) == ([data, b"y"], b"")
