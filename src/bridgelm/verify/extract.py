"""Finds the answer in a completion: in <answer> tags, \\boxed{}, behind ####, after "the answer is", or at the end.

A task says which rules are tried, and in which order; the result says which rule found the answer. All rules work on
strings in linear time, so that no hostile text can hang them.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Literal, get_args

Rule = Literal["tags", "boxed", "hashes", "phrase", "bare", "last"]
RULES: tuple[Rule, ...] = get_args(Rule)

THINK = re.compile(r"</?think>")
SPECIAL = re.compile(r"<\|[a-z_]{2,20}\|>(?:user|assistant|system)?")
BOX_TOKENS = re.compile(r"<\|begin_of_box\|>(.*?)<\|end_of_box\|>", re.DOTALL)
TAGS = re.compile(r"<answer>((?:(?!</?answer>)[\s\S])*)</answer>", re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
HASHES = re.compile(r"^[ \t]*####[ \t]*([^\n#][^\n]*)\Z", re.MULTILINE)  # the last line of GSM8K's solutions
BARE = re.compile(r"[^\s$\\{}]+")
# "The answer is", "**Answer:**", "Final answer\n"
ANCHOR = re.compile(r"(?:final\s+answer|\banswer)\**\s*(?:is|was|are|:|=|\n)\s*:?\s*\**\s*:?", re.IGNORECASE)
# A sentence ends at a line break, or at a full stop that is followed by white space or nothing (so not within 3.14).
SENTENCE_END = re.compile(r"\n|(?<![\s.][a-zA-Z])[.!?](?=\s|$)")
# What may stand for itself as a mathematical expression: TeX between delimiters, or a number.
# The bound on lengths keeps a text of a million "\(" linear.
INNER = r"((?:[^$\\]|\\[\s\S])+)"  # an escaped dollar does not close
TEX = rf"(?<!\\)\$\${INNER}\$\$|(?<!\\)\$((?:[^$\\\n]|\\.)+)\$|\\\(([^\n]{{0,500}}?)\\\)|\\\[([^$]{{0,500}}?)\\\]"
DELIMITED = re.compile(TEX)
MATHS = re.compile(TEX + r"|(?<![\w.\\])([-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?\s?(?:\\?%)?)")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character of the answer
VERB = re.compile(r"(?<![a-zA-Z])(?:is|are|equals|be|was|becomes|gives)(?![a-zA-Z])\s*:?\s*|:\s+")
WORD = re.compile(r"(?<![\\a-zA-Z_])[a-zA-Z][a-zA-Z'’-]+")
TEXT = re.compile(r"\\(?:text|mbox|textbf|mathrm|operatorname|begin|end)[a-z]*\s*\{[^{}]*\}")
# Words that occur in answers that are formulas, and words that occur in prose only.
OF_FORMULAS = {
    "and", "or", "sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp", "sqrt", "pi", "infinity",
    "infty", "theta", "alpha", "beta", "gamma", "lambda", "mod", "gcd", "lcm", "max", "min", "det", "arcsin",
    "arccos", "arctan", "cbrt", "frac", "choose", "for", "all", "real", "numbers", "except", "no", "solution",
    "solutions"}
OF_PROSE = {
    "the", "is", "are", "we", "so", "thus", "therefore", "hence", "because", "since", "that", "which", "have",
    "has", "get", "gives", "find", "then", "this", "it's", "let", "answer", "final", "value", "can", "must"}
LABEL = re.compile(r"(?<![\\a-zA-Z])(?!and\b|or\b)[a-zA-Z]{3,}\s*:?\s*(?:\$|\\\(|\\\[)"
                   r"|(?<![\\a-zA-Z])[a-zA-Z]{3,}\s?:\s")
BEFORE = re.compile(r"(?:(?<![\\a-z])[a-z]{2,}[\s,]+){3,}[^a-z]{0,8}\d")
JOINED = re.compile(r"(?:[\s$,;.&]|\\[()\[\],;:! ]|\\q?quad|\\text\s*\{|\}|\*|\band\b|\bor\b"
                    r"|[a-z]_?\{?\d?\}?\s*=)*", re.IGNORECASE)
JOINING = re.compile(r"[,;]|\band\b|\bor\b", re.IGNORECASE)
NEAR, BOXES = 45, 60


def find(text: str, rules: Sequence[Rule] = RULES, cut: bool = True) -> tuple[str | None, str]:
    """The answer and the rule that found it. `cut`: whether a box that the end of the text cuts off counts as no
    answer."""
    text = SPECIAL.sub("\n", BOX_TOKENS.sub(lambda m: f"<answer>{m.group(1)}</answer>", outside_think(text)))
    for rule in rules:
        if (found := FINDERS[rule](text, cut)) is not None:
            return found.strip(), rule
    return None, "none"


def outside_think(text: str) -> str:
    """The text outside think blocks. An unclosed block swallows the rest; a `</think>` that nothing opened was opened
    by the prompt, so all before it was thinking."""
    kept: list[str] = []
    inside, at = False, 0
    for tag in THINK.finditer(text):
        if tag.group() == "<think>":
            if not inside:
                kept.append(text[at : tag.start()])
            inside = True
        else:
            if not inside:
                kept.clear()
            inside, at = False, tag.end()
    if not inside:
        kept.append(text[at:])
    return "".join(kept)


def tagged(text: str) -> str | None:
    """The content of the last <answer>; if there is a box in it, the content of the box."""
    found = _last(TAGS, text)
    if found is None:
        return None
    inner = found.group(1)
    return boxes(inner) or inner


def boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...} (or \\boxed 5), braces nested."""
    found = _boxes(text, True)
    return found[-1][2] if found else None


def boxes(text: str, cut: bool = True) -> str | None:
    """The content of the last box, or of the last boxes if only separators part them: \\boxed{1} and \\boxed{2}."""
    found = _boxes(text, cut)
    if not found:
        return "" if BOX.search(text) and cut else None  # the text ended within its answer
    taken = [found[-1]]
    for before in reversed(found[:-1]):
        between = text[before[1] : taken[0][0]]
        if before[1] > taken[0][0]:  # this box encloses the one after it, which counts in its place
            continue
        if len(between) > NEAR or len(taken) == BOXES:
            break
        words = WORD.findall(TEXT.sub(" and " if "and" in between else " ", between))
        if not JOINED.fullmatch(between) and not (JOINING.search(between) and len(words) < 6 and "." not in between):
            break
        taken.insert(0, before)
    contents = list(dict.fromkeys(content for _, _, content in taken))
    return contents[0] if len(contents) == 1 else ", ".join(contents)


def _boxes(text: str, cut: bool) -> list[tuple[int, int, str]]:
    """Start, end and content of each box; a box that holds nothing but another box is left out."""
    starts = list(BOX.finditer(text))
    if not starts:
        return []
    closing = _closing_braces(text)
    found = []
    for start in starts:
        at = start.end()
        if at in closing:
            if not BOX.match(text, at + 1) or closing.get(BOX.match(text, at + 1).end()) != closing[at] - 1:  # pyright: ignore
                found.append((start.start(), closing[at] + 1, text[at + 1 : closing[at]].strip()))
        # Never closed: its content counts as whole only if a line end or a delimiter ends it.
        elif text.startswith("{", at):
            rest = text[at + 1 : at + 400]
            end = re.search(r"\$|\\\)|\\\]|\n", rest)
            if end or not cut:
                found.append((start.start(), len(text), rest[: end.start() if end else None].strip()))
        elif bare := BARE.match(text, at):
            found.append((start.start(), bare.end(), bare.group()))
    return found


def balanced(text: str) -> bool:
    """Whether every brace of an answer has its partner, which is not so in a text that was cut off within its box."""
    kinds = [found.group() for found in BRACE.finditer(text)]
    return kinds.count("{") == kinds.count("}") == len(_closing_braces(text))


def _closing_braces(text: str) -> dict[int, int]:
    """Maps each opening brace to the place where it is closed, in one pass."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for found in BRACE.finditer(text):
        if found.group() == "{":
            opened.append(found.start())
        elif found.group() == "}" and opened:
            closing[opened.pop()] = found.start()
    return closing


def anchored(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", up to the end of its sentence."""
    found = _last(ANCHOR, text)
    if found is None:
        return None
    rest = text[found.end() :].lstrip(" *\n")
    display = re.match(r"(?:\\\[|\$\$)\s*([\s\S]{1,500}?)\s*(?:\\\]|\$\$)", rest)
    if display:
        return display.group(1)
    stop = SENTENCE_END.search(rest)
    return (rest[: stop.start()] if stop else rest).strip(" *") or None


def hashes(text: str) -> str | None:
    """What stands behind #### in the last line; in any other line, #### starts a heading."""
    text = text.rstrip()
    found = HASHES.match(text, text.rfind("\n") + 1)
    return answer_of(found.group(1).strip()) if found else None


def phrase(text: str) -> str | None:
    """The answer within the sentence that announces it."""
    found = anchored(text)
    return None if found is None else answer_of(found)


def answer_of(sentence: str) -> str:
    """The answer in a sentence: all of it if it is a formula, else what stands after its last verb, else its last
    expression."""
    if not is_prose(sentence):
        return sentence
    if (verb := _last(VERB, sentence)) is not None:
        rest = sentence[verb.end() :].strip(" *")
        if rest and not is_prose(rest):
            return rest
    return last_run(sentence) or sentence


def last_run(sentence: str) -> str | None:
    """The last expression, together with those before it that are set off by separators only: "$3$ or $5$" is one
    answer of two values."""
    found = list(MATHS.finditer(sentence))[-40:]
    if not found:
        return None
    taken = [found[-1]]
    for before in reversed(found[:-1]):
        between = sentence[before.end() : taken[0].start()]
        if len(between) > NEAR or not JOINED.fullmatch(between) or not JOINING.search(between):
            break
        taken.insert(0, before)
    return ", ".join(_content(each) for each in taken)


def bare(text: str) -> str | None:
    """The whole text, if it is nothing but an answer."""
    text = text.strip()
    if not text or len(text) > 20_000 or "\n\n" in text or is_prose(text) or len(re.findall(r"(?<!\\)\$", text)) > 4:
        return None
    return text


def is_prose(text: str) -> bool:
    """Whether the text talks about an answer instead of being one."""
    outside = TEXT.sub(" ", DELIMITED.sub(" 0 ", text))
    words = [word.lower() for word in WORD.findall(outside)]
    if any(word in OF_PROSE for word in words) and len(words) > 1:
        return True
    others = [word for word in words if word not in OF_FORMULAS]
    if LABEL.search(TEXT.sub(" ", text)) or (others and BEFORE.search(outside.lower())):
        return True
    sentence = re.search(r"[a-z]{2}[.!?]\s+\S", outside)
    return len(others) > 6 or (sentence is not None and len(others) > 2)


def last(text: str) -> str | None:
    """The answer in the last line that has any mathematics in it."""
    for line in reversed(text.strip().splitlines()[-40:]):
        parts = [part for part in SENTENCE_END.split(line[-4000:]) if part and part.strip()]
        for part in reversed(parts):
            if MATHS.search(part):
                return answer_of(part)
    return last_maths(text)


def last_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def delimited(text: str) -> list[str]:
    """Every expression between TeX delimiters."""
    return [_content(found) for found in DELIMITED.finditer(text)]


def last_maths(text: str) -> str | None:
    """The last expression between TeX delimiters, or the last number."""
    found = _last(MATHS, text)
    return None if found is None else _content(found)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _content(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group is not None).strip()


FINDERS = {"tags": lambda text, cut: tagged(text), "boxed": boxes, "hashes": lambda text, cut: hashes(text),
           "phrase": lambda text, cut: phrase(text), "bare": lambda text, cut: bare(text),
           "last": lambda text, cut: last(text)}
