"""An answer that came compressed although it was asked for plain. No I/O.

Captured calls ask for ``Accept-Encoding: identity``: any agent takes a plain answer, and an engine
on the same machine, which is what capture is for, compresses nothing anyway. Where an upstream
compresses regardless, its bytes go to the agent as they came, and the record reads a decoded copy.
"""

from __future__ import annotations

from .call import Call
from .encoding import Decoder, Undecodable, decoder_for
from .wires.base import Untranslatable


class EncodedAnswer:
    """Takes an answer in place of its :class:`Call`, which sees it decoded.

    Where the request was altered on capture's behalf, the agent gets the stripped answer plain
    (``plain`` is true, and the ``Content-Encoding`` has to go), else the bytes as they came.
    """

    def __init__(self, call: Call, content_encoding: str) -> None:
        self._call = call
        self._decoder: Decoder | None = decoder_for(content_encoding)
        self.plain = call.altered and self._decoder is not None
        if self._decoder is None:
            call.note_fault(Undecodable(f"the answer's encoding {content_encoding[:40]!r} is not known here"))

    def whole(self, body: bytes) -> bytes:
        """See :meth:`Call.whole`. Raises Untranslatable where what is left cannot be told apart."""
        piece = self._decoded(body)
        made = self._call.whole(body if piece is None else piece)
        self._check_end()
        return made if self.plain else body

    def feed(self, chunk: bytes) -> bytes:
        """See :meth:`Call.feed`. Raises Untranslatable."""
        piece = self._decoded(chunk)
        made = b"" if piece is None else self._call.feed(piece)
        return made if self.plain else chunk

    def finish_stream(self) -> bytes:
        """See :meth:`Call.finish_stream`. Raises Untranslatable."""
        self._check_end()
        rest = self._call.finish_stream()
        return rest if self.plain else b""

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
        if self.plain:
            raise Untranslatable(str(error)) from error
