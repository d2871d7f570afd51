"""One rule, and the patterns that come with us."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lightning_proxy.config import RedactionSettings
from lightning_proxy.errors import ConfigError

from .paths import Step, parse_path


def _luhn(text: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1, annex B)."""
    digits = [int(digit) for digit in text if digit.isdigit()]
    doubled = [digit * 2 - 9 if digit > 4 else digit * 2 for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def _mod_97(text: str) -> bool:
    """The check digits of an IBAN (ISO 13616)."""
    plain = text.replace(" ", "")
    return int("".join(str(int(letter, 36)) for letter in plain[4:] + plain[:4])) % 97 == 1


def _as_long_as_a_number(text: str) -> bool:
    return 8 <= sum(letter.isdigit() for letter in text) <= 15  # E.164


# Each begins where a word does, so that the ids which engines and SDKs make up do not look like any of
# them. That is asked after the first letter, not before it: `re` skips quickly to a letter that can be the
# first, and asks at every place what has to be asked before. The last two stop where the next could begin,
# so that many beginnings without an end are each read once.
_KEYS = (
    r"s(?<![A-Za-z0-9]s)k-[A-Za-z0-9_-]{16,}",
    r"g(?<![A-Za-z0-9]g)(?:h[pousr]_[A-Za-z0-9]{20,}|ithub_pat_\w{20,}|lpat-[\w-]{20,})",
    r"A(?<![A-Za-z0-9]A)(?:(?:KI|SI)A[A-Z0-9]{16}|Iza[\w-]{30,})",
    r"x(?<![A-Za-z0-9]x)ox[abposr]-[A-Za-z0-9-]{10,}",
    r"h(?<![A-Za-z0-9]h)f_[A-Za-z0-9]{20,}",
    r"e(?<![A-Za-z0-9]e)yJ(?=[\w-]{8})(?:[A-Za-z0-9]++|[_-](?!eyJ))++\.eyJ[\w-]{8,}+\.[\w-]{8,}",
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"
    r"(?:[^-]++|-(?!----(?:BEGIN|END) [A-Z ]{0,20}PRIVATE KEY-----))*+-----END [A-Z ]{0,20}PRIVATE KEY-----",
)
_PHONE = (
    r"[+(\d](?<![\w+][+(\d])(?:(?<=\+)\d{1,3}(?:[ ./-]?\(?\d{1,4}\)?){2,6}"
    r"|(?<=\()\d{3}\) ?\d{3}[ .-]\d{4}|(?<=\d)\d{2}[ .-]\d{3}[ .-]\d{4})(?![\w-])"
)
_EMAIL = r"(?<![\w.%+-])[\w.%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"
_CARD = r"\d(?<![\w.-]\d)(?:[ -]?\d){12,18}(?![\w-])"
_IBAN = r"[A-Z](?<!\w[A-Z])[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"


class BuiltIn(NamedTuple):
    """A pattern that comes with us."""

    pattern: str
    confirms: Callable[[str], bool] | None = None  # what fits is really what it looks like
    needs: str = ""  # a text without this holds none of it: looked for first, for it is quick


BUILT_IN: dict[str, BuiltIn] = {
    "email": BuiltIn(_EMAIL, needs="@"),
    "credit_card": BuiltIn(_CARD, _luhn),
    "iban": BuiltIn(_IBAN, _mod_97),
    "phone": BuiltIn(_PHONE, _as_long_as_a_number),
    "api_key": BuiltIn("|".join(_KEYS)),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, ready to use: a pattern, a path, or a pattern at a path."""

    name: str
    pattern: re.Pattern[str] | None
    path: tuple[Step, ...] | None
    in_request: bool
    in_response: bool
    replacement: str
    roles: frozenset[str]
    confirms: Callable[[str], bool] | None = None
    needs: str = ""

    @staticmethod
    def of(settings: RedactionSettings) -> Rule:
        """The rule that an entry of the settings means. Raises ``ConfigError`` naming what is wrong."""
        text, confirms, needs = settings.pattern, None, ""
        if settings.builtin is not None:
            text, confirms, needs = BUILT_IN[settings.builtin]
        return Rule(
            settings.name,
            None if text is None else _compiled(settings.name, text),
            None if settings.path is None else _parsed(settings.name, settings.path),
            settings.where in ("request", "both"),
            settings.where in ("response", "both"),
            settings.replacement,
            frozenset(settings.roles),
            confirms,
            needs,
        )

    def is_for(self, role: str | None) -> bool:
        """Whether it holds for the calls of this role."""
        return not self.roles or role in self.roles

    def replaced(self, text: str, found: list[str]) -> str:
        """``text`` without what the pattern fits, which is added to ``found``."""
        assert self.pattern is not None  # of rules that have one
        if self.needs not in text:
            return text

        def replace(match: re.Match[str]) -> str:
            fits = match.group()
            if not fits or (self.confirms is not None and not self.confirms(fits)):
                return fits
            found.append(fits)
            return self.replacement

        return self.pattern.sub(replace, text)


def _compiled(name: str, pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"redaction rule {name!r}: the pattern {pattern!r} is no regular expression: {error}"
        ) from error
    if compiled.fullmatch(""):
        raise ConfigError(
            f"redaction rule {name!r}: the pattern {pattern!r} fits where there is nothing: say what must "
            "be there, e.g. with + for *"
        )
    return compiled


def _parsed(name: str, path: str) -> tuple[Step, ...]:
    try:
        return parse_path(path)
    except ValueError as error:
        raise ConfigError(f"redaction rule {name!r}: the path {path!r} cannot be read: {error}") from error
