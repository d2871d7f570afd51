"""Compressed bodies, taken apart for the record. No I/O: bytes in, bytes out.

gzip, deflate and zstd (``backports.zstd``, from Python 3.14 on the standard library's ``compression.zstd``)
are always known; br where ``brotli`` is installed, as in the extra ``compression``.
What cannot be read travels all the same: these bytes are for the record only.
"""

from __future__ import annotations

import importlib
import logging
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

log = logging.getLogger(__name__)

LARGEST = 2**28  # bytes of a decoded body that are read for the record
_SLICE = 2**14  # bytes decoded at one go: bounds what a body made to explode can take
_RAW_DEFLATE = -zlib.MAX_WBITS
_WITH_HEADER = 32 + zlib.MAX_WBITS  # zlib finds out whether it is gzip's or its own
_PLAIN = frozenset(("", "identity"))


class Undecodable(ValueError):
    """The body is not in the encoding that its header names, or would grow beyond all bounds."""


class Decoder:
    """One body, encoded in each of ``codings`` in turn (as ``Content-Encoding`` lists them)."""

    def __init__(self, codings: Iterable[Coding], largest: int = LARGEST) -> None:
        self._steps = list(codings)[::-1]
        self._room = largest
        self.begun = False

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes; return what they decode to. Raises Undecodable."""
        made = []
        self.begun = self.begun or bool(data)
        for start in range(0, len(data), _SLICE):
            piece = data[start : start + _SLICE]
            for step in self._steps:
                piece = step.feed(piece)
            self._room -= len(piece)
            if self._room < 0:
                raise Undecodable("it is too large once decoded")
            made.append(piece)
        return b"".join(made)

    @property
    def ended(self) -> bool:
        """Whether the encoded data is complete."""
        return all(step.ended for step in self._steps)


def decoder_for(content_encoding: str | None, largest: int = LARGEST) -> Decoder | None:
    """A decoder for what a ``Content-Encoding`` header names; ``None`` where one is not known here."""
    names = [name.strip().lower() for name in (content_encoding or "").split(",")]
    makers = [_maker(name.removeprefix("x-")) for name in names if name not in _PLAIN]
    known = [make for make in makers if make is not None]
    return Decoder([make() for make in known], largest) if len(known) == len(makers) else None


def decoded(body: bytes, content_encoding: str | None, largest: int = LARGEST) -> bytes | None:
    """A whole body without its encodings; ``None`` where it cannot be had."""
    decoder = decoder_for(content_encoding, largest)
    if decoder is None:
        return None
    try:
        plain = decoder.feed(body)
    except Undecodable:
        return None
    return plain if decoder.ended or not body else None


class Coding:
    """One encoding. A stream may hold several members, one after the other, as gzip's may."""

    def __init__(self, fresh: Callable[[], Any], decode: Callable[[Any, bytes], bytes]) -> None:
        self._fresh = fresh
        self._decode = decode
        self._member: Any = None

    def feed(self, data: bytes) -> bytes:
        made = []
        while data:
            if self._member is None or self._member.eof:
                self._member = self._fresh()
            try:
                made.append(self._decode(self._member, data))
            except Exception as error:  # each library has errors of its own
                raise Undecodable(str(error)) from error
            data = self._member.unused_data if self._member.eof else b""
        return b"".join(made)

    @property
    def ended(self) -> bool:
        return self._member is not None and bool(self._member.eof)


class _Deflate:
    """``deflate``: zlib's format by the standard, but some send the bare one."""

    def __init__(self) -> None:
        self._inner: Any = None

    def decompress(self, data: bytes) -> bytes:
        if self._inner is None:
            bare = data[0] & 0x0F != zlib.DEFLATED
            self._inner = zlib.decompressobj(_RAW_DEFLATE if bare else _WITH_HEADER)
        return bytes(self._inner.decompress(data))

    @property
    def eof(self) -> bool:
        return self._inner is not None and bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)


class _Brotli:
    """brotli's decompressor under the names of zlib's. Its streams have one member."""

    unused_data = b""

    def __init__(self, library: Any) -> None:
        self._inner = library.Decompressor()

    def decompress(self, data: bytes) -> bytes:
        return bytes(self._inner.process(data))

    @property
    def eof(self) -> bool:
        return bool(self._inner.is_finished())


@cache
def _maker(name: str) -> Callable[[], Coding] | None:
    fresh: Callable[[], Any] | None = None
    if name == "gzip":
        fresh = lambda: zlib.decompressobj(_WITH_HEADER)  # noqa: E731
    elif name == "deflate":
        fresh = _Deflate
    elif name == "br" and (brotli := _library("brotli", "brotlicffi")) is not None:
        fresh = lambda: _Brotli(brotli)  # noqa: E731
    elif name == "zstd" and (zstd := _library("compression.zstd", "backports.zstd")) is not None:
        fresh = zstd.ZstdDecompressor
    if fresh is None:
        log.warning("bodies encoded as %r pass through unread: no library for it is installed", name[:40])
        return None
    maker = fresh
    return lambda: Coding(maker, lambda member, data: bytes(member.decompress(data)))


def _library(*names: str) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None
