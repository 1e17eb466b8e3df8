"""Parses TeX to exact sympy expressions with math-verify's grammar: decimals become fractions, 2(1/2) a product.

Only the TeX grammar of math-verify is used, since its `parse` hands plain text to sympy's parser, which evaluates it as
Python. Numbers too big to be written down are never evaluated.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex

from bridgelm.verify.math.split import THOUSANDS

LONGEST = 3000
DEEPEST = 60
BITS = 30_000  # the size of the largest number that is written out
CONFIG = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="none",
                             equations=False)
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|cis)")
SEVERAL = re.compile(r"\\(?:max|min|gcd|lcm)|operatorname|[a-zA-Z]\(")
PRIMES = re.compile(r"(?<=[a-zA-Z)}])'+")
# The grammar drops a base, dots and quotes, multiplies 1 2, and takes (a)_b for a number of permutations.
DROPPED = re.compile(r"(?<![\^\d])\d+\s*_|\)\s*_|\d\s+\d|\\ldots|['\"]")
CONSTANTS = {"e": sympy.E, "i": sympy.I}


class TooBig(Exception):
    """A number is too big to be written out, or a text too long to be parsed."""


class Unreadable(Exception):
    """The text is not a mathematical expression."""


class Converter(_Latex2Sympy):
    """math-verify's converter without its mixed numbers (which are read before) and without floats."""

    def convert_postfix_list(self, arr: list[Any], i: int = 0) -> Any:
        left = self.convert_postfix(arr[i])
        if isinstance(left, list):  # d/dx before what it differentiates
            return super().convert_postfix_list(arr, i)
        if i == len(arr) - 1:
            return left
        right = self.convert_postfix_list(arr, i + 1)
        if any(getattr(side, "is_Matrix", False) for side in (left, right)):
            return self.mat_mul_flat(left, right)
        return self.mul_flat(left, right)

    def parse_number(self, text: str) -> Any:
        text = text.replace(",", "")
        mantissa, _, exponent = text.lower().partition("e")
        if len(mantissa) > LONGEST or len(exponent) > 5:
            raise TooBig
        return sympy.Rational(text)


@lru_cache(maxsize=512)
def parse(text: str) -> Any:
    """A sympy expression with exact numbers; raises Unreadable or TooBig if there is none."""
    if len(text) > LONGEST or _depth(text) > DEEPEST:
        raise TooBig
    text = _meant(text)
    if not text or DROPPED.search(text):
        raise Unreadable
    try:
        converter = Converter(config=ConversionConfig(lowercase_symbols=False))
        found = converter.parse(normalize_latex(text, CONFIG))
    except (TooBig, MemoryError, RecursionError):
        raise
    except Exception as error:  # the grammar raises plain exceptions of many kinds
        raise Unreadable from error
    if not isinstance(found, sympy.Basic | sympy.MatrixBase):
        raise Unreadable
    if not isinstance(found, sympy.MatrixBase):
        check(found)
    return _constants(found)


def _meant(text: str) -> str:
    """Rewrites what the grammar would misread: degrees within sines, i and e, roots and powers of functions."""
    if TRIGONOMETRY.search(text):
        text = text.replace(r"^\circ", r"\cdot\frac{\pi}{180}")
    if not SEVERAL.search(text):
        text = THOUSANDS.sub(lambda found: found.group().replace(",", ""), text)
    text = text.replace(r"^\circ", "").replace(r"\$", " ").replace("$", " ")
    text = re.sub(r"\\text\s*\{\s*\}", " ", text)
    return PRIMES.sub(lambda found: "^{" + r"\prime " * len(found.group()) + "}", text).strip()


def _constants(found: Any) -> Any:
    names = {s: CONSTANTS[s.name] for s in found.free_symbols if s.name in CONSTANTS}
    return found.xreplace(names) if names else found


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def check(expression: Any) -> None:
    """Raises TooBig if evaluating the expression would write out a number of more than BITS bits."""
    for node in sympy.preorder_traversal(expression):
        if isinstance(node, sympy.Pow | sympy.factorial | sympy.binomial | sympy.Sum | sympy.Product):
            bits(node)


def bits(node: Any) -> float:
    """An upper bound on the bits of a number's value, without evaluating it; a symbol counts as one bit."""
    if node.is_Rational:
        return max(abs(int(node.p)).bit_length(), int(node.q).bit_length())
    if not node.args:
        return 2.0
    sizes = [bits(argument) for argument in node.args if isinstance(argument, sympy.Basic)]
    if isinstance(node, sympy.Pow) and not node.exp.free_symbols:
        size = 2.0 ** min(sizes[1], 64) * max(sizes[0], 1) if sizes[1] > 8 or not node.exp.is_Rational \
            else abs(float(node.exp)) * sizes[0]
        size = min(size, abs(float(node.exp)) * sizes[0]) if node.exp.is_Rational and sizes[1] < 64 else size
    elif isinstance(node, sympy.factorial | sympy.binomial):
        size = 2.0 ** min(max(sizes), 64) * 16 if not node.free_symbols else 2.0
        arguments: list[Any] = list(node.args)
        if all(argument.is_Rational for argument in arguments):
            largest = max(abs(float(argument)) for argument in arguments)
            size = largest * math.log2(largest + 2)
    elif isinstance(node, sympy.Sum | sympy.Product):
        size = max(sizes)
        ends: list[Any] = [end for limit in node.args[1:] for end in limit.args[1:] if end.is_Rational]
        if any(abs(int(end)) > 5000 for end in ends):
            raise TooBig
    else:
        size = sum(sizes)
    if size > BITS:
        raise TooBig
    return size
