"""Personal data in texts: reported, or masked by placeholders that are the same for the same value.

Speaks of texts and spans. What has check digits counts only where they are right (python-stdnum), and what is a
telephone number only a country's numbering plan knows (phonenumbers): digits in a row are most often something else.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from typing import NamedTuple

from graft.config.base import did_you_mean
from graft.config.clean import Personal
from graft.data.clean.step import Drop, Notes, Result, edit_texts, texts
from graft.errors import ConfigError
from graft.types import Conversation


class Found(NamedTuple):
    """A piece of personal data."""

    start: int
    end: int
    kind: str
    value: str
    """Its canonical form: the same for the same card with and without blanks."""


_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[a-zA-Z]{2,24}(?![\w-])", re.ASCII)
_NOBODYS = re.compile(
    r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|[\w-]+\.(?:example|invalid|test|localhost))\Z", re.IGNORECASE
)
"""Reserved by RFC 2606 for documentation: they reach nobody."""
_IP = re.compile(r"(?<![\w.:/-])(?:\d{1,3}\.){3}\d{1,3}(?![\w:-]|\.\d)", re.ASCII)
_IP6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{1,4}:){2,7}[0-9a-fA-F:]{1,19}(?![\w:.])", re.ASCII)
_VERSION = re.compile(r"(?:version|ver\.?|release|v\.?|版本|==?)\s*$", re.IGNORECASE)
_CARD = re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)", re.ASCII)
_GROUPED = re.compile(r"\d+|\d{4}(?P<gap>[ -])\d{4}(?P=gap)\d{4}(?P=gap)\d{1,7}|\d{4}([ -])\d{6}\2\d{5}")
"""How cards are written: without gaps, in fours, or as American Express does."""
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)", re.ASCII)
_DIGITS = re.compile(r"\d(?:[\s().-]{0,3}\d){6}")
"""Seven digits, the fewest that a telephone number has: the search for one is slow, this is not."""

_WRITTEN_IDS = {
    "cn.ric": r"(?<![\w.-])[1-9]\d{16}[\dXx](?![\w-])",  # China, resident identity card
    "kr.rrn": r"(?<![\w-])\d{6}-[1-4]\d{6}(?![\w-])",  # Korea
    "br.cpf": r"(?<![\w.-])\d{3}\.\d{3}\.\d{3}-\d{2}(?![\w-])",  # Brazil
    "es.dni": r"(?<![\w.-])\d{8}-?[A-HJ-NP-TV-Z](?![\w-])",  # Spain
    "es.nie": r"(?<![\w.-])[XYZ]-?\d{7}-?[A-HJ-NP-TV-Z](?![\w-])",  # Spain, foreigners
    "it.codicefiscale": r"(?<!\w)[A-Z]{6}\d{2}[A-EHLMPR-T]\d{2}[A-Z]\d{3}[A-Z](?!\w)",  # Italy
    "fr.nir": r"(?<![\w.-])[12] ?\d{2} ?(?:0[1-9]|1[0-2]) ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}(?![\w-])",  # France
    "pl.pesel": r"(?i:\bpesel)\W{0,12}(?P<number>\d{11})(?!\w)",  # Poland
    "nl.bsn": r"(?i:\bbsn|burgerservicenummer)\W{0,12}(?P<number>\d{9})(?!\w)",  # Netherlands
    "us.ssn": r"(?i:\bssn|social security)(?i:\s+(?:number|no|is)){0,2}\W{0,6}(?P<number>\d{3}-?\d{2}-?\d{4})(?!\w)",
    "in_.aadhaar": r"(?i:aadhaar)\D{0,20}(?P<number>\d{4}[ -]?\d{4}[ -]?\d{4})(?!\w)",  # India
    "tr.tckimlik": r"(?i:t\.?c\.? kimlik)\D{0,20}(?P<number>\d{11})(?!\w)",  # Turkey
}
_IDS = {name: re.compile(pattern, re.ASCII) for name, pattern in _WRITTEN_IDS.items()}
"""Identity numbers whose form or check digits are seldom met by chance; the others only after their name."""


def check_regions(settings: Personal) -> None:
    """Refuse a country without a numbering plan.

    Raises:
        ConfigError: names the code and the nearest known one.
    """
    if not settings.regions:
        return
    from phonenumbers import SUPPORTED_REGIONS

    for region in settings.regions:
        if region not in SUPPORTED_REGIONS:
            hint = did_you_mean(region.upper(), sorted(SUPPORTED_REGIONS))
            raise ConfigError(f"step personal: no country `{region}`{hint} (two capitals, such as CN, US, DE)")


def treat_personal(conversation: Conversation, settings: Personal, notes: Notes) -> Result:
    """Count personal data, and mask it or drop the conversation where `action` says so.

    Placeholders are numbered within the conversation in order of first appearance: [EMAIL_1] is the same address
    wherever it stands there. Arguments of tool calls are looked at, too; `meta` columns are not.
    """
    names: dict[tuple[str, str], str] = {}
    numbers: Notes = Notes()

    def mask(_role: str, text: str) -> str:
        pieces, at = [], 0
        for found in find_personal(text, settings.kinds, settings.regions):
            notes[found.kind] += 1
            key = (found.kind, found.value)
            if key not in names:
                numbers[found.kind] += 1
                names[key] = f"[{found.kind.upper()}_{numbers[found.kind]}]"
            pieces += [text[at : found.start], names[key]]
            at = found.end
        return "".join([*pieces, text[at:]]) if pieces else text

    masked = edit_texts(conversation, mask, calls=True)
    if settings.action == "mask" or masked is conversation:
        return masked
    if settings.action == "report":
        return conversation
    kinds, regions = settings.kinds, settings.regions
    place = next((field for field, _, text in texts(conversation) if find_personal(text, kinds, regions)), "messages")
    return Drop(place, "personal data: " + ", ".join(f"{count} {kind}" for kind, count in sorted(numbers.items())))


def find_personal(text: str, kinds: tuple[str, ...], regions: tuple[str, ...] = ()) -> list[Found]:
    """What personal data a text holds, in order; where two overlap, the kind that is surer (as listed in _FINDERS)."""
    found: list[Found] = []
    digits = bool(_DIGITS.search(text))
    for kind, find in _FINDERS.items():
        if kind in kinds and (digits or kind in ("email", "ip")):
            for item in find(text, regions):
                if all(item.end <= other.start or item.start >= other.end for other in found):
                    found.append(item)
    return sorted(found)


def _emails(text: str, _regions: tuple[str, ...]) -> Iterator[Found]:
    if "@" not in text:
        return
    for match in _EMAIL.finditer(text):
        if not _NOBODYS.search(match[0]):
            yield Found(match.start(), match.end(), "email", match[0].lower())


def _ibans(text: str, _regions: tuple[str, ...]) -> Iterator[Found]:
    for match in _IBAN.finditer(text):
        # A word in capitals after the number would be taken for its end: try shorter ones, blank by blank.
        words = match[0].split(" ")
        for count in range(len(words), 0, -1):
            value = " ".join(words[:count])
            if _validator("iban")(value):
                yield Found(match.start(), match.start() + len(value), "iban", value.replace(" ", ""))
                break


def _ids(text: str, _regions: tuple[str, ...]) -> Iterator[Found]:
    for name, pattern in _IDS.items():
        group = "number" if "number" in pattern.groupindex else 0
        for match in pattern.finditer(text):
            if _validator(name)(match[group]):
                yield Found(match.start(group), match.end(group), "id", re.sub(r"[ .-]", "", match[group]).upper())


def _cards(text: str, _regions: tuple[str, ...]) -> Iterator[Found]:
    for match in _CARD.finditer(text):
        number = re.sub(r"[ -]", "", match[0])
        if (
            number[0] in "23456"
            and _GROUPED.fullmatch(match[0])
            and len(set(number)) > 1
            and _validator("luhn")(number)
        ):
            yield Found(match.start(), match.end(), "card", number)


def _ips(text: str, _regions: tuple[str, ...]) -> Iterator[Found]:
    """Addresses that the whole net can reach; private, loopback and documentation ranges are nobody's."""
    matches = _IP.finditer(text) if text.count(".") >= 3 else iter(())
    if "::" in text or text.count(":") >= 7:
        matches = chain(matches, _IP6.finditer(text))
    for match in matches:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            continue
        if address.is_global and not _VERSION.search(text[max(0, match.start() - 12) : match.start()]):
            yield Found(match.start(), match.end(), "ip", str(address))


def _phones(text: str, regions: tuple[str, ...]) -> Iterator[Found]:
    from phonenumbers import Leniency, PhoneNumberFormat, PhoneNumberMatcher, format_number

    for region in (*regions, None):
        if region is None and "+" not in text and "＋" not in text:
            continue
        for match in PhoneNumberMatcher(text, region, Leniency.VALID):
            value = format_number(match.number, PhoneNumberFormat.E164)
            yield Found(match.start, match.end, "phone", value)


_FINDERS: dict[str, Callable[[str, tuple[str, ...]], Iterator[Found]]] = {
    "email": _emails,
    "iban": _ibans,
    "id": _ids,
    "card": _cards,
    "ip": _ips,
    "phone": _phones,
}


@cache
def _validator(name: str) -> Callable[[str], bool]:
    """The check of a number by its module in stdnum, such as `cn.ric`."""
    import importlib

    check: Callable[[str], bool] = importlib.import_module(f"stdnum.{name}").is_valid
    return check
