"""One spelling for what people write in several: unicode, LaTeX synonyms, spacing, separators of thousands.

`canonical` changes how an answer is written, never what it says. Every rule is a table entry or one linear pass.
"""

from __future__ import annotations

import re
import unicodedata

from reward.child.tables import DROPPED, SUBSCRIPTS, SUPERSCRIPTS, SYNONYMS, UNICODE

_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_UNICODE_CHARACTER = re.compile("|".join(map(re.escape, sorted(UNICODE, key=len, reverse=True))))

_COMMAND = re.compile(r"\\([a-zA-Z]+)\s*")
_SPACING = re.compile(r"(?<!\\)\\[!,;: >/]|\\\n|~|\\hspace\s*\{[^{}]*\}|\\phantom\s*\{[^{}]*\}|\\(?:left|right)\s*\.")
_ENVIRONMENT_OF_LINES = re.compile(r"\\(?:begin|end)\s*\{(?:equation|align|aligned|gather|gathered|split|math)\*?\}")
_WRAPPER = re.compile(
    r"\\(?:mathrm|mathbf|mathit|mathsf|mathtt|mathcal|boldsymbol|bm|operatorname\*?|vec|hat|mathop)\s*"
)
_OPERATOR_NAME = re.compile(
    r"\\(?:operatorname\*?|mathrm)\s*\{\s*(arc(?:sin|cos|tan)|sin|cos|tan|ln|log|exp|gcd|lcm|max|min|arg|Re|Im|abs)\s*\}"
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|textup|emph|mbox|hbox|mathrm|textmd|underline)\s*\{([^{}]*)\}"
)
_WRAPPED = re.compile(r"\\text\s*\{([^{}]*)\}")
# "{5 \\choose 2}", "_5C_2" and "5C2", "C(5, 2)".
_CHOOSE = re.compile(
    r"\{?([^{}\\]{1,20})\\choose([^{}\\]{1,20})\}?|(?:\{\s*\})?[_^]?\{?(?<![0-9A-Za-z.])(\d+)\}?\s*C\s*_?\{?(\d+)\}?(?![\w.])"
    r"|(?<![A-Za-z\\])C\((\d+),\s*(\d+)\)"
)
_POSITIVE_REALS = re.compile(r"\\mathbb\s*\{R\}\s*(?:\^\s*\{?\+\}?|_\s*\{?\s*(?:\+|>\s*0)\s*\}?)")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*)*)\}")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?![\d,]|\.\d+,)")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d,])")
_EUROPEAN = re.compile(
    r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d+)(?![\d.,])|(?<![\d.,])(\d{1,3}(?:\.\d{3}){2,})(?![\d.,])"
)
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d{1,6})(?![\w.])")


def canonical(text: str) -> str:
    """The answer in LaTeX of one dialect. Text wrappers become `\\text{...}`, everything else mathematics."""
    text = _VULGAR.sub(_vulgar_fraction, text)
    text = _RAISED.sub(lambda match: "^{" + match[0].translate(SUPERSCRIPTS) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + match[0].translate(SUBSCRIPTS) + "}", text)
    text = _UNICODE_CHARACTER.sub(lambda match: UNICODE[match[0]], text)
    text = unicodedata.normalize("NFKC", text)
    text = (
        text.replace("\\$", "\\dollar ")
        .replace("\\%", "%")
        .replace("\\#", "#")
        .replace("\\&", "&")
        .replace("&=", "=")
        .replace("\\_", "_")
    )
    text = (
        text.replace(r"\(", " ").replace(r"\)", " ").replace(r"\[", " ").replace(r"\]", " ")
        if "\\\\[" not in text
        else text
    )
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times ", text.replace("...", r"\ldots "))
    text = _ENVIRONMENT_OF_LINES.sub(" ", text)
    # "4\!:\!51" and "11,\!880" are one number or time; a space there would split them.
    text = re.sub(r"(?<!\\)\\!", "", text)
    text = _OPERATOR_NAME.sub(r"\\\1 ", text)
    text = _SPACING.sub(" ", text)
    text = _TEXT.sub(lambda match: "\\text{" + match[1] + "}", text)
    # "\\text{m} / \\text{s}" is one unit.
    text = re.sub(r"\\text\{([^{}]*)\}\s*(?:/|\\cdot)\s*\\text\{([^{}]*)\}", r"\\text{\1/\2}", text)
    text = _CHOOSE.sub(lambda m: f"\\binom{{{m[1] or m[3] or m[5]}}}{{{m[2] or m[4] or m[6]}}}", text)
    text = _POSITIVE_REALS.sub(r"(0, \\infty)", text)
    text = _WRAPPER.sub(" ", text)
    text = _COMMAND.sub(_one_name, text)
    return " ".join(text.split())


def join_thousands(text: str) -> str:
    """`1,234` as `1234`, at the top level only: between brackets a comma separates."""
    text = _EUROPEAN.sub(lambda m: (m[1] or m[3]).replace(".", "") + (f".{m[2]}" if m[2] else ""), text)
    text = _SPACED_THOUSANDS.sub(lambda match: match[1].replace(" ", ""), text)
    text = _SCIENTIFIC.sub(r"(\1\\cdot 10^{\2})", text)
    depth, out, start = 0, [], 0
    for index, character in enumerate(text):
        step = (character in "([") - (character in ")]")
        if step and (depth == 0 or depth + step == 0):
            out.append(_join(text[start:index]) if depth == 0 else text[start:index])
            start = index
        depth = max(0, depth + step)
    out.append(_join(text[start:]) if depth == 0 else text[start:])
    return "".join(out)


def _join(text: str) -> str:
    return _THOUSANDS.sub(lambda match: match[1] + match[2].replace(",", ""), text)


def _one_name(match: re.Match[str]) -> str:
    name = match[1]
    if name in DROPPED:
        return " "
    new = SYNONYMS.get(name, name)
    return f"{new} " if not new[0].isalpha() else f"\\{new}" if new.endswith("}") else f"\\{new} "


def _vulgar_fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def unbox(text: str) -> str:
    return _BOXED.sub(r"\1", text)


def unwrapped(text: str, space: str = " ") -> str:
    """The text without `\\text{}` around its parts."""
    return _WRAPPED.sub(lambda match: space + match[1] + space, text)


def trim(text: str) -> str:
    """Without quotes, emphasis and full stops around it; an ellipsis stays."""
    before = None
    while text != before:
        before = text
        text = text.strip().strip('"`').removesuffix(",").removesuffix(";").removesuffix(":")
        text = text.removeprefix(":").removeprefix("$").removesuffix("$") if text.count("$") == 2 else text
        if text.startswith("**") and text.endswith("**") and len(text) > 4:
            text = text[2:-2]
        if text.endswith(".") and not text.endswith("..") and not re.search(r"\b[ap]\.m\.$", text):
            text = text[:-1]
        if match := re.fullmatch(r"\\text\s*\{([^{}]*)\}", text):
            text = match[1] if re.search(r"[\d,;]|^\W*\w\W*$", match[1]) else text
        if text.endswith("\\\\"):
            text = text[:-2]
    return text
