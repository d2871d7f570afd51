"""An answer that came compressed although it was asked for plain. No I/O.

Captured calls ask for ``Accept-Encoding: identity``: any agent takes a plain answer, and an engine
on the same machine, which is what capture is for, compresses nothing anyway. Where an upstream
compresses regardless, its bytes go to the agent as they came, and the record reads a decoded copy.
"""

from __future__ import annotations

from aiohttp.hdrs import CONTENT_ENCODING
from multidict import CIMultiDict

from .call import Call
from .encoding import Decoder, Undecodable, decoder_for
from .wires.base import Untranslatable


class EncodedAnswer:
    """Takes an answer in place of its :class:`Call`, which sees it decoded.

    Where the request was altered on capture's behalf, what this added has to come out: the agent
    then gets the rest plain, and the ``Content-Encoding`` goes from ``headers``. A whole answer that
    has nothing to come out, and any answer to an unaltered request, stays as it came.
    """

    def __init__(self, call: Call, headers: CIMultiDict[str]) -> None:
        self._call = call
        self._headers = headers
        encoding = headers[CONTENT_ENCODING]
        self._decoder: Decoder | None = decoder_for(encoding)
        self._plain = call.altered and self._decoder is not None
        if self._plain and call.streamed:
            del headers[CONTENT_ENCODING]
        if self._decoder is None and (call.status or 0) < 400:
            call.note_fault(Undecodable(f"the answer's encoding {encoding[:40]!r} is not known here"))

    def whole(self, body: bytes) -> bytes:
        """See :meth:`Call.whole`. Raises Untranslatable where what was added cannot be taken out."""
        piece = self._decoded(body)
        self._check_end()
        made = self._call.whole(body if piece is None else piece)
        if not self._plain or made == piece:
            return body
        del self._headers[CONTENT_ENCODING]
        return made

    def feed(self, chunk: bytes) -> bytes:
        """See :meth:`Call.feed`. Raises Untranslatable."""
        piece = self._decoded(chunk)
        made = b"" if piece is None else self._call.feed(piece)
        return made if self._plain else chunk

    def finish_stream(self) -> bytes:
        """See :meth:`Call.finish_stream`. Raises Untranslatable."""
        self._check_end()
        rest = self._call.finish_stream()
        return rest if self._plain else b""

    def _decoded(self, data: bytes) -> bytes | None:
        if self._decoder is None:
            return None
        try:
            return self._decoder.feed(data)
        except Undecodable as error:
            self._give_up(error)
            return None

    def _check_end(self) -> None:
        if self._decoder is not None and not self._decoder.ended and self._decoder.begun:
            self._give_up(Undecodable("the encoded data is not complete"))

    def _give_up(self, error: Undecodable) -> None:
        self._decoder = None
        self._call.note_fault(error)
        if self._plain:
            raise Untranslatable(str(error)) from error
