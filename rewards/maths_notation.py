r"""One notation for mathematics: LaTeX as math-verify's grammar reads it.

Its grammar is made for LaTeX. Unicode (`x²`, `−5`, `√2`, `½`), plain notation (`2**10`, `1e3`,
`2 1/2`), repeating decimals, grouped digits and number words (`5 million`) are rewritten here, each
to the value that a reader gives it; compatibility folding (NFKC) would make 52 of 5² and 1/2 of a
digit and a half.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from rewards.maths_number_words import calculated

_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
# Full-width forms and the alphabets and digits of mathematical fonts: ASCII in another dress.
_STYLED = re.compile("[\uff01-\uff5e\U0001d400-\U0001d7ff]")
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPT = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ", "0123456789+-()n")
_SYMBOLS = {
    "−": "-",
    "–": "-",
    "—": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": r"\div ",
    "±": r"\pm ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\neq ",
    "≈": r"\approx ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "∞": r"\infty ",
    "ℝ": r"\mathbb{R}",
    "°": r"^\circ ",
    "′": "'",
    "“": '"',
    "”": '"',
}
_SYMBOL = re.compile("|".join(_SYMBOLS))
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+(?:\.[0-9]+)?|[A-Za-zπ]))")
_OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])")

# Something left out, something invisible, a version number: math-verify reads them as values.
_UNREADABLE = re.compile(r"\\[lc]?dots|…|\\[hv]?phantom|[0-9]\.[0-9]*\.[0-9]")


def to_latex(text: str) -> str | None:
    r"""`text` in LaTeX on one line, without math delimiters and without the full stop at its end.

    None for what math-verify would read as something else than it says: digits of another script,
    circled ones or numerals such as 五; `1, \ldots, 9`; 1.2.3.
    """
    text = _INVISIBLE.sub("", text).strip("* ")
    text = _STYLED.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = _unicode_to_latex(text)
    foreign_digits = any(not c.isascii() and unicodedata.numeric(c, None) is not None for c in text)
    if foreign_digits or _UNREADABLE.search(text):
        return None
    text = text.replace(r"\%", "%").replace("%", r"\%").replace(r"\bmod", r"\mod")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return calculated(text).strip().rstrip(" .,;")


def num_ors(text: str) -> int:
    """Times that `text` says "or"; in LaTeX it becomes the same comma as "and"."""
    return len(_OR.findall(text))


def _unicode_to_latex(text: str) -> str:
    text = _script(text, _SUPERSCRIPT, "^")
    text = _script(text, _SUBSCRIPT, "_")
    text = re.sub("[¼-¾⅐-⅞]", _vulgar_fraction, text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}", text)
    return _SYMBOL.sub(lambda match: _SYMBOLS[match[0]], text)


def _script(text: str, table: dict[int, int], mark: str) -> str:
    characters = re.escape("".join(map(chr, table)))
    return re.sub(f"[{characters}]+", lambda m: f"{mark}{{{m[0].translate(table)}}}", text)


def _vulgar_fraction(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{over}}}{{{under}}}"


def _repeating_decimal(match: re.Match[str]) -> str:
    """0.1(6) → (16 − 1)/90."""
    whole, fixed, period = match.groups()
    nines = 10 ** len(period) - 1
    numerator = int(f"{whole}{fixed}{period}") - int(f"{whole}{fixed}" or "0")
    return rf"\frac{{{numerator}}}{{{nines * 10 ** len(fixed)}}}"


def _without_groups(match: re.Match[str]) -> str:
    return re.sub("[^0-9]", "", match[0])


def _tower(match: re.Match[str]) -> str:
    """a^b^c → a^{b^{c}}, as everybody reads it; math-verify goes from the left."""
    steps = match[1].split("^")
    return "".join(f"^{{{step}" for step in steps) + "}" * len(steps)


_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Math delimiters, fonts and spaces.
        (r"(?<!\\)(?:\$|\\[()\[\]])", ""),
        (r"\\(?:displaystyle|textstyle|bf|rm|bm|boldsymbol)(?![A-Za-z])", ""),
        ("[~\u00a0\u2000-\u200a\u202f\u205f\u3000\\s]+", " "),
        # 5 \text{ or } 6; 5, \text{ and } 6
        (
            r"\\(?:text|mbox|mathrm|textrm)\s*\{([^{}]*?)\b(?:and|or)\b([^{}]*)\}",
            r"\\text{\1},\\text{\2}",
        ),
        (r",(?:\s*\\text\{\s*\})?\s*,", ","),
        # 2**10; 3*x
        (r"\*\*", "^"),
        (r"(?<=[\w)}\]])\s*\*\s*(?=[\w({\\\[-])", r" \\cdot "),
        # 0.1\overline{6}
        (
            r"(?<![0-9])([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{([0-9]+)\}",
            _repeating_decimal,
        ),
        # 1.5e-3
        (
            rf"(?<![A-Za-z0-9.])({_NUMBER}|\.[0-9]+)[eE]([-+]?[0-9]+)(?![0-9A-Za-z])",
            r"\1 \\cdot 10^{\2}",
        ),
        # 2 1/2
        (r"(?<![0-9./^])([0-9]+) +([0-9]+)/([0-9]+)(?![0-9/.])", r"\1\\frac{\2}{\3}"),
        # 1\,000; 1{,}000; 1 000; 1_000 (1,000 is read by math-verify)
        (
            r"(?<![0-9.,])[0-9]{1,3}(?:(?:\\[,;:! ]|\{,\}|[ _])[0-9]{3})+(?![0-9])",
            _without_groups,
        ),
        # Numbers side by side are added by math-verify, as in 2\frac{1}{2}. 5 6 are two of them:
        (
            rf"(?<!frac )(?<!binom )(?<![\w^.])({_NUMBER})"
            r"(?:\\[,;:! ]|\\q*quad(?![a-z])|\s)+(?=[0-9])",
            r"\1, ",
        ),
        # 2(3), (7)(8) and {7}{8} are products.
        (
            rf"((?<![\w.^\\{{]){_NUMBER}|(?:\\right\s*)?\)|(?<![\w}}\]^\\])\{{[0-9.]+\}})"
            r"\s*(?=(?:\\left\s*)?\(|(?<=\})[{0-9])",
            r"\1 \\cdot ",
        ),
        # 2pi; 2^-3; 9^9^9
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"\^(-[0-9]+|-[A-Za-z])", r"^{\1}"),
        (r"\^(\w+(?:\^-?\w+)+)", _tower),
    )
]
