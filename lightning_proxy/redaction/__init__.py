"""What must not be kept, taken out of a span before it is written. Nothing here does I/O.

``redactor``  what becomes of a span: its texts, its token data, its digest (read this first)
``rules``     one rule, and the patterns that come with us
``paths``     the JSON paths of rules
``inside``    JSON in texts, and what reading it once does not show: names that stand twice, escapes

May import ``errors``, ``config`` and ``store``. Whoever writes spans calls it: the proxy for what it
captures, the exchange for what it imports. docs/redaction.md says what it can and cannot promise.
"""

from lightning_proxy.redaction.redactor import Redactor

__all__ = ["Redactor"]
