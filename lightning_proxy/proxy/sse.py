"""Server-sent events, parsed incrementally. No I/O: bytes in, events out.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

import re
from typing import NamedTuple

# A blank line ends an event; each line ends in CRLF, LF or CR. "\r\n" alone is one line end.
_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
_LONGEST_BLANK = 4
_LINE_END = re.compile(rb"\r\n|\n|\r")


class Event(NamedTuple):
    """One event: the bytes as they came, and its data lines joined (``None``: it has none)."""

    raw: bytes
    data: bytes | None


class SseParser:
    """Splits a byte stream, cut anywhere, into events.

    The ``raw`` of all events plus ``rest()`` is the stream, byte for byte.
    """

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, chunk: bytes) -> list[Event]:
        """Take the next bytes; return the events that they complete."""
        if not self._buffer and chunk.endswith(b"\n\n") and b"\r" not in chunk:
            # Whole events, as engines send them: nothing to put together.
            return [Event(raw + b"\n\n", _data_of(raw)) for raw in chunk[:-2].split(b"\n\n")]
        scan_from = max(0, len(self._buffer) - _LONGEST_BLANK)
        buffer = self._buffer + chunk if self._buffer else chunk
        events: list[Event] = []
        start = 0
        while (blank := _BLANK_LINE.search(buffer, max(start, scan_from))) is not None:
            raw = buffer[start : blank.end()]
            events.append(Event(raw, _data_of(raw[: blank.start() - blank.end()])))
            start = blank.end()
        self._buffer = buffer[start:]
        return events

    def rest(self) -> bytes:
        """What came after the last complete event."""
        return self._buffer


def _data_of(text: bytes) -> bytes | None:
    """The data of an event without its blank line."""
    if text.startswith(b"data: ") and b"\n" not in text and b"\r" not in text:
        return text[6:]  # a single data line: what engines send
    if text.startswith(b"event: ") and text.count(b"\n") == 1 and b"\r" not in text:
        data = text.partition(b"\ndata: ")[2]  # the same with a name before it
        if data:
            return data
    lines: list[bytes] = []
    for line in _LINE_END.split(text):
        if line.startswith(b"data:"):
            value = line[5:]
            lines.append(value[1:] if value.startswith(b" ") else value)
    return b"\n".join(lines) if lines else None


def with_data(event: Event, data: bytes) -> bytes:
    """An event's bytes with other data (one line); its other fields, comments and line ends stay."""
    raw = event.raw
    only_data = event.data is not None and len(raw) == len(event.data) + 8 and raw.startswith(b"data: ")
    if only_data and raw.endswith(b"\n\n"):
        return encode_event(data)
    if event.data and raw.endswith(b"\ndata: " + event.data + b"\n\n"):
        return raw[: -len(event.data) - 2] + data + b"\n\n"
    made, lines, line_ends = [], _LINE_END.split(raw), _LINE_END.findall(raw)
    for line, line_end in zip(lines, line_ends, strict=False):
        if not line.startswith(b"data:"):
            made.append(line + line_end)
        elif data:
            made.append(b"data: " + data + line_end)
            data = b""
    return b"".join(made)


def encode_event(data: bytes) -> bytes:
    """One event with one data line (``data`` holds no line end)."""
    return b"data: " + data + b"\n\n"
