"""Rewrites an answer into one spelling: Unicode, plain text and TeX dialects all become the same TeX.

This is done on strings, without regard to meaning. Every step is linear in the length of its input, and nothing is
evaluated.
"""

from __future__ import annotations

import re
import unicodedata

SUPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱᵃᵇᶜᵈᵉᵏᵐᵖᵗˣʸᶻ", "0123456789+-=()niabcdekmptxyz", strict=True))
SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₒₓₖₗₘₙₚₛₜᵢⱼ", "0123456789+-=()aeoxklmnpstij", strict=True))
FRACTIONS = {"½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
             "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
             "⅑": (1, 9), "⅒": (1, 10)}
NAMES = [
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu",
    "xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"]
GREEK = dict(zip("αβγδεζηθικλμνξοπρστυφχψω", NAMES, strict=True)) | {
    "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi",
    "Ψ": "Psi", "Ω": "Omega", "ϕ": "phi", "ε": "epsilon", "ϵ": "epsilon", "ϑ": "theta"}
SYMBOLS = {
    **dict.fromkeys("−–—‐‑‒﹣－", "-"), **dict.fromkeys("·⋅∙•∗", r"\cdot "), "×": r"\times ", "÷": "/",
    "∕": "/", "⁄": "/", "∶": ":", "∞": r"\infty ", "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ",
    "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≦": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "≧": r"\ge ", "⩾": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "≅": r"\cong ", "≡": r"\equiv ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∉": r"\notin ", "∅": r"\emptyset ", "∖": r"\setminus ", "⊂": r"\subset ", "⊆": r"\subseteq ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "…": r"\ldots ", "⋯": r"\ldots ", "∠": r"\angle ", "△": r"\triangle ",
    "′": "'", "’": "'", "‘": "'", "″": "''", "“": '"', "”": '"', "∣": "|", "∥": r"\parallel ", "→": r"\to ",
    "⇒": r"\Rightarrow ", "∨": r"\lor ", "∧": r"\land ", "∼": r"\sim ", "∂": r"\partial ", "∫": r"\int ",
    "∑": r"\sum ", "∏": r"\prod ", "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "", "\u2061": "",
    "\u2062": "", "\u00ad": "", "，": ",", "；": ";", "：": ":", "（": "(", "）": ")", "。": "."}
CHARACTERS = str.maketrans(SYMBOLS | {k: rf"\{name} " for k, name in GREEK.items()})
RAISED = re.compile(f"[{''.join(SUPER)}]+")
LOWERED = re.compile(f"[{''.join(SUB)}]+")
NARROW = re.compile("(?<=[0-9])[\u00a0\u2009\u202f\u2007\u2006\u2005\u2002\u2004](?=[0-9]{3}(?![0-9]))")
ROOT = re.compile(r"([√∛∜])\s*(\(|\{|\d+(?:\.\d+)?|\\[a-zA-Z]+|[a-zA-Z])?")
DEGREE_OF_ROOT = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}

SQRT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\\[a-zA-Z]+|[0-9a-zA-Z])")
LOG_BASE = re.compile(r"\\log\s*_\s*(10|[0-9a-z])(?![0-9])")
REPEATED = re.compile(r"(\d*\.\d{0,9}?)(\d{1,6}?)\2{2,9}\s*\\ldots")  # 0.333...
FONT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathtt|mathnormal"
                  r"|boldsymbol|bm|operatorname\*?|textstyle|emph|underline)\s*(?=\{)")
KEPT_FONT = re.compile(r"\\(?:operatorname\*?|mathrm|mathbf|mathit|boldsymbol|bm)\s*\{\s*"
                       r"(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|arc?sinh|arc?cosh|arc?tanh|ln|log"
                       r"|exp|gcd|lcm|max|min|det|floor|ceil)"
                       r"\s*\}")
LETTER_FONT = re.compile(r"\\(?:mathrm|mathit|mathbf|boldsymbol|bm|mathsf|mathnormal)\s*\{\s*([a-zA-Z])\s*\}")
BASES = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
BASE_WORDS = re.compile(r"(?<=[0-9A-F])\s*(?:\(|\\text\s*\{)?\s*\(?\s*(?:in\s+)?base[\s-]+"
                        r"(\d{1,2}|" + "|".join(BASES) + r")\s*[)}]{0,2}"
                        r"|_\s*\{?\s*\\text\s*\{\s*(" + "|".join(BASES) + r")\s*\}\s*\}?", re.IGNORECASE)
PAIRS = [
    (re.compile(r"(\\mathbb\{R\}|\\mathbb R)\s*\\\s*\{([^{}]*)\}"), r"\1\\setminus\\{\2\\}"),
    (re.compile(r"all real (?:numbers|values)(?: of [a-z])? except(?: for)?\s*([^,;]+)$"),
     r"\\mathbb{R}\\setminus\\{\1\\}"),
    (re.compile(r"(\\log_\{[^{}]*\}|\\log_(?!10(?!\d))\d)(?=[0-9a-z\\])"), r"\1 "),
    (BASE_WORDS, lambda m: _base(m[1] or m[2])),
    (re.compile(r"(?<!\\)\$([^$]+?)(?<!\\)\$(?!\d)"), r" \1 "),  # $125$ miles
    (re.compile(r"(?<!\\)\\[\[\]()]"), " "),
    (re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)"), lambda m: m.group().replace(" ", ",")),  # 1 000
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![a-zA-Z])\s*\.?(?=\s*(?:[()\[\]|/.<>]|\\|$))"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|strut|hfill|noindent)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"(?<=[0-9])\{,\}\s*(?=[0-9])"), ","),
    (re.compile(r",?\\!\s*"), lambda m: "," if m.group().startswith(",") else ""),
    (re.compile(r"(?<=[0-9])(?:\\[,:; ]|~)\s*(?=[0-9]{3}(?![0-9]))"), ","),  # 10\,000
    (re.compile(r"\\[,:;>]|\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])|~|(?<!\\)\\(?=\s)"), " "),
    (re.compile(r"\\(?:hspace|vspace|phantom|hphantom|label|tag)\*?\s*\{[^{}]*\}"), " "),
    (re.compile(r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\(?:neq|not\s*=)(?![a-zA-Z])"), r"\\ne "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"), (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"), (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\l(?:brack)(?![a-zA-Z])"), "["), (re.compile(r"\\r(?:brack)(?![a-zA-Z])"), "]"),
    (re.compile(r"\\[lr]?vert(?![a-zA-Z])"), "|"), (re.compile(r"\\lparen(?![a-zA-Z])"), "("),
    (re.compile(r"\\rparen(?![a-zA-Z])"), ")"),
    (re.compile(r"\\(?:dots[bcmio]?|cdots|ldots)(?![a-zA-Z])"), r"\\ldots "),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\bigcup(?![a-zA-Z])"), r"\\cup "), (re.compile(r"\\bigcap(?![a-zA-Z])"), r"\\cap "),
    (re.compile(r"\\backslash(?![a-zA-Z])"), r"\\setminus "), (re.compile(r"\\simeq(?![a-zA-Z])"), r"\\approx "),
    (re.compile(r"\\(?:ne|not)\s*\\in(?![a-zA-Z])"), r"\\notin "), (re.compile(r"\\div(?![a-zA-Z])"), "/"),
    (re.compile(r"\\over(?:rightarrow|line)\s*\{([A-Z]{2})\}"), r"\1"), (re.compile(r"\\colon(?![a-zA-Z])"), ":"),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?(?![a-zA-Z])|\\(?:degree|textdegree)(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r"\\bmod(?![a-zA-Z])"), r"\\mod "), (re.compile(r"\\varepsilon"), r"\\epsilon"),
    (re.compile(r"\\varphi"), r"\\phi"),
    (re.compile(r"\\dot\{([0-9])\}"), r"\\overline{\1}"),
]
# Spellings of plain text, as a person types it.
PLAIN = [
    (re.compile(r"(?<![\\a-zA-Z])(?:infinity|infty)(?![a-zA-Z])", re.IGNORECASE), r"\\infty "),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*(?=[({0-9a-zA-Z\\])"), r"\\sqrt"),
    (re.compile(r"(?<![\\a-zA-Z])cbrt\s*(?=[({])"), r"\\sqrt[3]"),
    (re.compile(r"(?<![\\a-zA-Z])(pi|theta|alpha|beta|gamma|lambda|omega|phi)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"(?<![\\a-zA-Z])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp)"
                r"(?=\s*[(^_0-9\\ ])"), r"\\\1"),
    (re.compile(r"<=|=<"), r"\\le "), (re.compile(r">="), r"\\ge "), (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\+\s?/\s?-|\+-(?=\s*[0-9\\])"), r"\\pm "), (re.compile(r"\*\*"), "^"),
    (re.compile(r"\s*\*\s*"), r"\\cdot "), (re.compile(r"(?<=[)\]])\s*[Uu]\s*(?=[(\[])"), r"\\cup "),
    (re.compile(r"(?<=[0-9.])\s*[xX]\s*(?=10\s*\^)"), r"\\times "),
]
MARKED = re.compile(r"(?<![\w)*])\*\*(?=\S)([^*]+?)(?<=\S)\*\*(?![\w(*])")
WRAPS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`"), ('"', '"')]
ALIGN = re.compile(r"\\(?:begin|end)\{(?:align|equation|gather|aligned|split|center|displaymath|math)\*?\}")
CALL = re.compile(r"\\sqrt(\[[^\]]*\])?\s*\(|\^\s*\(")


def spell(text: str) -> str:
    """The answer in our TeX: no Unicode, no spacing commands, one name for each thing, every argument in braces."""
    text = MARKED.sub(r"\1", text)
    if not text.isascii():
        text = unicode_to_tex(text)
    text = unwrap(ALIGN.sub(" ", text).replace("\r", " ").replace("\n", " ").replace("\t", " "))
    text = re.sub(r"\\\\(?=[a-zA-Z]{2})", r"\\", text) if "matrix" not in text and "cases" not in text else text
    for pattern, by in PAIRS:
        text = pattern.sub(by, text)  # pyright: ignore[reportArgumentType, reportCallIssue]
    text = FONT.sub(r"\\text", LETTER_FONT.sub(r"{\1}", KEPT_FONT.sub(r"\\\1 ", text)))
    parts = re.split(r"(\\text\{[^{}]*\})", text)  # text in \text{} stays as it is
    parts[::2] = [_plain(part) for part in parts[::2]]
    return braced(unwrap("".join(parts)))


def _base(word: str) -> str:
    return f"_{{{BASES.index(word.lower()) + 2 if word.isalpha() else word}}}"


def _plain(text: str) -> str:
    for pattern, by in PLAIN:
        text = pattern.sub(by, text)
    return round_arguments(text)


def unicode_to_tex(text: str) -> str:
    text = NARROW.sub(",", text)
    for character, (top, bottom) in FRACTIONS.items():
        text = text.replace(character, rf"\frac{{{top}}}{{{bottom}}}")
    text = RAISED.sub(lambda m: "^{" + "".join(SUPER[c] for c in m.group()) + "}", text)
    text = LOWERED.sub(lambda m: "_{" + "".join(SUB[c] for c in m.group()) + "}", text)
    text = ROOT.sub(_root, text.translate(CHARACTERS))
    return text if text.isascii() else unicodedata.normalize("NFKC", text).translate(CHARACTERS)


def _root(found: re.Match[str]) -> str:
    sign, operand = DEGREE_OF_ROOT[found.group(1)], found.group(2) or ""
    return sign + (operand if operand in {"", "(", "{"} else "{" + operand + "}")


def unwrap(text: str) -> str:
    """The answer without what surrounds it and is not part of it."""
    while True:
        before = text
        text = text.strip().rstrip(".,;:!").rstrip() if not text.rstrip().endswith(("!", r"\!")) else text.strip()
        for left, right in WRAPS:
            inner = text[len(left):len(text) - len(right)]
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right) \
                    and left not in inner and not inner.endswith("\\"):
                text = inner
                break
        if text == before:
            return text


def round_arguments(text: str) -> str:
    """Puts braces round the arguments of sqrt(x+1) and x^(1/2), in one pass from the right for each kind."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for at, character in enumerate(text):
        if character == "(":
            opened.append(at)
        elif character == ")" and opened:
            closing[opened.pop()] = at
    opens = {m.end() - 1 for m in CALL.finditer(text)} & closing.keys()
    if not opens:
        return text
    closes = {closing[at] for at in opens}
    return "".join("{" if i in opens else "}" if i in closes else c for i, c in enumerate(text))


def braced(text: str) -> str:
    """Puts braces round each argument of \\frac12, \\frac\\pi 2, \\sqrt3."""
    text = SQRT.sub(lambda m: rf"\sqrt{m.group(1) or ''}{{{m.group(2)}}}", text)
    text = REPEATED.sub(r"\1\\overline{\2}", LOG_BASE.sub(r"\\log_{\1}", text))
    if r"\frac" in text:
        pieces = PIECE.findall(text)
        text = _with_braces(pieces, _partners(pieces))
    return re.sub(r"\s+", " ", text).strip()


PIECE = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)


def _partners(pieces: list[str]) -> dict[int, int]:
    opened, found = [], {}
    for i, piece in enumerate(pieces):
        if piece == "{":
            opened.append(i)
        elif piece == "}" and opened:
            found[opened.pop()] = i
    return found


def _with_braces(pieces: list[str], partner: dict[int, int]) -> str:
    """Puts both arguments of each \\frac in braces, in one pass: `wanted` counts those still to come at each depth."""
    out: list[str] = []
    wanted, ends = [0], []
    for i, piece in enumerate(pieces):
        if piece.isspace() and wanted[-1]:
            continue
        if piece == r"\frac" and not wanted[-1]:
            out.append(piece)
            wanted[-1] = 2
        elif piece == "{" and i in partner:
            wanted[-1] = max(0, wanted[-1] - 1)
            wanted.append(0)
            ends.append(partner[i])
            out.append(piece)
        elif ends and i == ends[-1]:
            ends.pop()
            wanted.pop()
            out.append(piece)
        elif wanted[-1] and (piece.isalnum() or piece.startswith("\\")):
            wanted[-1] -= 1
            out.append("{" + piece + "}")
        else:
            wanted[-1] = 0
            out.append(piece)
    return "".join(out)
