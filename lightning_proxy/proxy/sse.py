"""Server-sent events, parsed incrementally. No I/O: bytes in, events out.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# A blank line ends an event; each line ends in CRLF, LF or CR. "\r\n" alone is one line end.
_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
_LONGEST_BLANK = 4
_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class Event:
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
        scan_from = max(0, len(self._buffer) - _LONGEST_BLANK)
        buffer = self._buffer + chunk if self._buffer else chunk
        find_end = _end_of_lf_event if b"\r" not in buffer else _end_of_event
        events: list[Event] = []
        start = 0
        while (end := find_end(buffer, max(start, scan_from))) != -1:
            raw = buffer[start:end]
            events.append(Event(raw, _data_of(raw)))
            start = end
        self._buffer = buffer[start:]
        return events

    def rest(self) -> bytes:
        """What came after the last complete event."""
        return self._buffer


def _end_of_lf_event(buffer: bytes, start: int) -> int:
    """Where the next event ends, in a stream without CR: the search that costs least."""
    at = buffer.find(b"\n\n", start)
    return at if at == -1 else at + 2


def _end_of_event(buffer: bytes, start: int) -> int:
    match = _BLANK_LINE.search(buffer, start)
    return -1 if match is None else match.end()


def _data_of(raw: bytes) -> bytes | None:
    if raw.startswith(b"data: ") and raw.endswith(b"\n\n") and raw.find(b"\n") == len(raw) - 2:
        return raw[6:-2]  # one LF-terminated data line: what engines send
    lines: list[bytes] = []
    for line in _LINE_END.split(raw):
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
