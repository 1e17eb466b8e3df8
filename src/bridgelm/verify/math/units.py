"""Reads what stands beside a number: units, money, percent, multipliers and words.

Units that both answers name must be the same or of one kind (5 cm = 50 mm); a unit that only one of them names is
ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from bridgelm.verify.math.number import exact

# name -> (what it measures, its size in base units)
TABLE: dict[str, tuple[str, Fraction]] = {}


def _add(kind: str, **names: str) -> None:
    for size, spellings in names.items():
        for name in spellings.split():
            TABLE[name] = (kind, Fraction(size.removeprefix("x").replace("d", "/")))


_add("length", x1d1000="mm millimeter millimetre", x1d100="cm centimeter centimetre", x1d10="dm decimeter",
     x1="m meter metre", x1000="km kilometer kilometre", x127d5000="in inch inche", x381d1250="ft foot feet",
     x1143d1250="yd yard", x201168d125="mi mile")
_add("time", x1="s sec second", x60="min minute", x3600="h hr hour", x86400="day", x604800="week")
_add("months", x1="month", x12="year yr")
_add("mass", x1="g gram", x1000="kg kilogram", x1d1000="mg milligram")
_add("weight", x1="oz ounce", x16="lb pound", x32000="ton")
_add("volume", x1="l liter litre", x1d1000="ml milliliter")
_add("gallons", x1="gallon gal", x1d4="quart", x1d8="pint")
_add("dollars", x1="dollar usd $", x1d100="cent ¢")
_add("euros", x1="euro eur €")
_add("pounds", x1="£ gbp")
_add("degrees", x1="degree deg")
_add("celsius", x1="°c")
_add("fahrenheit", x1="°f")
_add("hertz", x1="hz hertz", x1000="khz")
_add("force", x1="n newton")
_add("energy", x1="j joule", x1000="kj")
_add("power", x1="w watt")
ONE_LETTER = {"m", "s", "g", "h", "L", "N", "J", "W", "V"}
MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
MULTIPLIER = re.compile(rf"\s*(?:\\text\s*\{{)?\s*({'|'.join(MULTIPLIERS)})s?(?![a-zA-Z])", re.IGNORECASE)
FILLERS = {"long", "tall", "of", "the", "a", "an", "in", "wide", "deep", "high", "old", "away", "only", "each", "total"}
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
# Words that change a number rather than name what is counted.
CHANGING = {
    "or", "more", "less", "than", "fewer", "not", "least", "most", "plus", "minus", "times", "over", "under",
    "percent", "mod", "modulo", "factorial", "half", "halves", "third", "thirds", "quarter", "quarters", "to",
    "about", "between", "except", "without", "remainder", "base", "is", "are", "if", "no", "neither", "any", "all",
    "every", "infinitely", "undefined", "does", "greater", "both", "either", "but", *MULTIPLIERS}
PERCENT = re.compile(r"\s*(?:\\%|%|\\text\s*\{\s*(?:percent|per cent|pct|percentage|\\?%)(?:age points?)?\s*\}"
                     r"|(?<![a-zA-Z])(?:percent|per cent|pct|percentage)(?![a-zA-Z])(?:\s+points?)?)\s*$",
                     re.IGNORECASE)
MONEY = re.compile(r"^\s*([-+]?)\s*(?:(?:US|USD)\s*)?(\\\$|\$|€|£|\\pounds(?![a-zA-Z])|USD(?![a-zA-Z]))\s*([-+]?)")
MONEY_END = re.compile(r"\s*(\\\$|\$|€|£|¢)\s*$")
ABOUT = re.compile(r"^\s*(?:\\approx|\\sim|~"
                   r"|(?:\\text\s*\{\s*)?(?:approximately|approx\.?|about|roughly|nearly|around|exactly)"
                   r"\s*\}?)\s*(?=[-+\d\\$.])", re.IGNORECASE)
TAIL = re.compile(r"(?:\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
                  r"|\s+[a-zA-Z][a-zA-Z.'’-]*(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
                  r"|\s*/\s*(?=\\text|[a-zA-Z])|\s*\([a-z ]+\))+$")
GLUED = re.compile(r"(?<=\d)\s?(km/h|m/s|cm|mm|km|kg|mg|ml|mL|ft|mph|lbs?|hrs?|mins?|secs?|inches|feet|miles|meters"
                   r"|hours|minutes|seconds|days|years|dollars|cents|m|s|g|h)(\s*\^\s*\{?\s*\d\s*\}?)?$")
SPEEDS = re.compile(r"(?<![a-zA-Z])(?:mph|km?ph)(?![a-zA-Z])", re.IGNORECASE)
WORD = re.compile(r"[a-zA-Z$°¢€£]+|\^\s*\{?\s*-?\d\s*\}?|/")


@dataclass(frozen=True)
class Quantity:
    """The text of a value, and what stood beside it."""

    text: str
    percent: bool = False
    unit: tuple[tuple[str, Fraction], ...] | None = None  # None: none named, or none that is known
    words: str = ""


def quantity(text: str, single: bool) -> Quantity:
    """`single`: whether a lone letter after a blank may be a unit (5 m)."""
    text = ABOUT.sub("", text.strip())
    unit = ""
    if found := MONEY.match(text):
        text, unit = found.group(1) + found.group(3) + text[found.end():], found.group(2).replace("\\", "")
    elif (found := MONEY_END.search(text)) and re.search(r"\d\s*$", text[:found.start()]):
        text, unit = text[:found.start()], found.group(1).replace("\\", "")
    if found := PERCENT.search(text):
        return Quantity(text[:found.start()].strip(), True)
    words = ""
    found = TAIL.search(text)
    if found and found.start() and _number_like(text[:found.start()]) and _countable(found.group(), single):
        words, text = found.group(), text[:found.start()]
    elif found := GLUED.search(text):
        words, text = found.group(), text[:found.start()]
        if not single and len(found.group(1)) == 1:
            words, text = "", text + words
    text, words, factor = _multiplied(text.strip(), words)
    degrees = re.fullmatch(r"(.*\d|.*\}|.*\))\s*\^\\circ\s*([CF]?)", text)
    if degrees and not re.search(r"\\(?:circ|sin|cos|tan|cot|sec|csc)", degrees.group(1)):
        text, words = degrees.group(1), {"C": "°c", "F": "°f"}.get(degrees.group(2), "degrees") + words
    if factor != 1:
        value = exact(text)
        text = rf"{factor}\cdot({text})" if value is None else str(value * factor)
    return Quantity(text.strip(), False, dimensions(f"{unit} {words}"), words)


def _number_like(head: str) -> bool:
    """Whether the text before the words ends like a number."""
    return bool(re.search(r"(?:[\d})!]|\\pi|\^\\circ)\s*$", head)) and not head.rstrip().endswith("\\}")


def _countable(tail: str, single: bool) -> bool:
    """Whether the words only name what is counted."""
    plain = re.sub(r"\\text|\^\s*\{?\s*-?\d\s*\}?|[{}()]", " ", tail)
    found = re.findall(r"[a-zA-Z]+", plain)
    first = [word.lower() for word in found[:2]]
    if len(found) > 8 or {"squared", "cubed"} & {*first[:1]}:
        return False
    if not {*first[:1]} & MULTIPLIERS.keys() and CHANGING & {*first}:
        return False
    if "\\text" in tail:
        return True
    return all(len(word) > 1 or (single and word in ONE_LETTER) or (i and word in {"a", "m", "s", "h", "p"})
               for i, word in enumerate(found)) and all(word not in {"mod", "pi", "or", "and"} for word in found)


def _multiplied(text: str, words: str) -> tuple[str, str, int]:
    """Applies multipliers in words: 5 million is 5 000 000."""
    found = MULTIPLIER.match(words)
    if not found:
        return text, words, 1
    return text, words[found.end():], MULTIPLIERS[found.group(1).lower()]


def dimensions(words: str) -> tuple[tuple[str, Fraction], ...] | None:
    """The known units in the words with their powers multiplied out; None where any is unknown or none is named."""
    found: dict[str, list[Fraction]] = {}
    sign, power = 1, 1
    last = ""
    words = SPEEDS.sub(lambda m: " km/h " if m.group().lower().startswith("k") else " mile/h ", words)
    for token in WORD.findall(re.sub(r"\\text|\\mathrm|\\", " ", words)):
        name = token.lower()
        if name in {"per", "/"}:
            sign, power = -1, 1
        elif name in {"squared", "cubed"} or name.startswith("^"):
            if last:
                exponent = int(re.sub(r"[^-\d]", "", name)) if name.startswith("^") else POWERS[name]
                kind, size = TABLE[last]
                found[last] = [Fraction(exponent) * (1 if found[last][0] > 0 else -1)]
        elif name in POWERS:
            power = POWERS[name]
        elif (known := name if name in TABLE else name.removesuffix("s") if name.removesuffix("s") in TABLE else ""):
            last = known
            found[last] = [found.get(last, [Fraction(0)])[0] + sign * power]
            power = 1
        elif name not in FILLERS and (sign < 0 or not last):
            return None
    if not found:
        return (("square", Fraction(power)),) if power > 1 else None
    total: dict[str, Fraction] = {}
    size = Fraction(1)
    for name, (exponent,) in found.items():
        kind, factor = TABLE[name]
        total[kind] = total.get(kind, Fraction(0)) + exponent
        if exponent.denominator == 1 and abs(exponent) <= 4:
            size *= factor ** int(exponent)
    return (*sorted((kind, power) for kind, power in total.items() if power), ("size", size))


def factor_between(a: Quantity, b: Quantity) -> Fraction | None:
    """How many of b's units one of a's is; None if they measure different things. 1 where either names none."""
    if a.unit is None or b.unit is None:
        return Fraction(1)
    kinds = [{kind: power for kind, power in side.unit or () if kind != "size"} for side in (a, b)]
    if any("square" in kind for kind in kinds):  # "square units"
        powers = [next(iter(kind.values())) for kind in kinds]
        return Fraction(1) if powers[0] == powers[1] else None
    if kinds[0] != kinds[1]:
        return None
    return dict(a.unit)["size"] / dict(b.unit)["size"]
