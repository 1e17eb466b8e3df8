"""Compares a prediction with the gold answer in every way in which the two can be read."""

from __future__ import annotations

import re

from bridgelm.verify.extract import balanced
from bridgelm.verify.math.equal import equal
from bridgelm.verify.math.expression import TooBig, Unreadable
from bridgelm.verify.math.leaves import skeleton
from bridgelm.verify.math.shape import LABELLED, Shape, readings


def judge(gold: str, prediction: str) -> tuple[bool, str]:
    """Whether the two are equal, and by which rule. Both are texts in our spelling (spelling.py)."""
    if skeleton(gold) == skeleton(prediction):
        return True, "same text"
    if not balanced(prediction):
        return False, "cut"
    rule, problem = "", ""
    predictions = [*readings(prediction, False), *labelled(gold, prediction)]
    for g in readings(gold, True):
        for p in predictions:
            try:
                if found := equal(g, p):
                    return True, found
            except (Unreadable, TooBig) as error:
                problem = "unreadable" if isinstance(error, Unreadable) else "too big"
            rule = rule or (g.kind if g.kind == p.kind else f"{g.kind} against {p.kind}")
    return False, problem or rule


def labelled(gold: str, prediction: str) -> list[Shape]:
    """The readings of a labelled choice: `C. 12` is the choice C and the value 12."""
    if not (found := LABELLED.fullmatch(prediction)):
        return []
    letter = found.group(1) or found.group(2)
    if re.search(r"(?<![a-z])(?:and|or|not)(?![a-z])|\([A-J]\)|^\W*,", found.group(3)):
        return []  # more than one choice
    if re.fullmatch(r"\W*(?:\\text)?\W*[A-J]\W*", gold):
        return [Shape("words", letter)]
    return readings(found.group(3).strip().removesuffix("}") if not balanced(found.group(3)) else found.group(3), False)
