"""Tables of notation and words: what one means by them, and nothing else."""
# ruff: noqa: RUF001 - characters that look like others are the point

from __future__ import annotations

from fractions import Fraction


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _row(text: str) -> list[str]:
    return text.split()


# -- notation

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣ", "0123456789+-()nx")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ", "0123456789+-()nx")
UNICODE = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-",
    "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "∗": "*", "÷": r"\div ", "⁄": "/", "∕": "/",
    "∞": r"\infty ", "π": r"\pi ", "Π": r"\Pi ", "𝜋": r"\pi ", "±": r"\pm ", "∓": r"\mp ",
    "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≅": r"\approx ", "≡": r"\equiv ",
    "∈": r"\in ", "∉": r"\notin ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∅": r"\emptyset ", "Ø": r"\emptyset ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "°": r"^\circ ", "º": r"^\circ ", "′": "'", "’": "'", "‘": "'", "″": "''", "“": '"', "”": '"', "√": r"\sqrt",
    "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "…": r"\ldots ", "→": r"\to ", "¢": r"\cents ", "∧": r"\wedge ", "∨": r"\vee ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta ", "λ": r"\lambda ",
    "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ", "Ω": r"\Omega ",
    "€": r"\euro ", "£": r"\pound ", "¥": r"\yen ", "₹": r"\rupee ", "{,}": ",",
    "\u200b": "", "\ufeff": "", "\u2061": "", "\u2062": "",
}  # fmt: skip
SYNONYMS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge",
    "lt": "<", "gt": ">", "neq": "ne", "varnothing": "emptyset", "ast": "*", "cdotp": "cdot", "dots": "ldots", "cdots": "ldots",
    "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "dbinom": "binom",
    "tbinom": "binom", "arccos": "acos", "arcsin": "asin", "arctan": "atan", "varphi": "phi", "varepsilon": "epsilon",
    "lor": "vee", "land": "wedge", "R": "mathbb{R}", "Reals": "mathbb{R}", "lvert": "|", "rvert": "|", "vert": "|",
    "mid": "|", "colon": ":", "backslash": "setminus", "degree": "circ", "infin": "infty", "tg": "tan", "ctg": "cot",
    "percent": "%", "thickapprox": "approx", "simeq": "approx", "cong": "approx",
}  # fmt: skip
DROPPED = words(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits nolimits quad qquad "
    "phantom hspace vspace thinspace medspace bf rm it sf boldmath middle mathstrut strut allowbreak hfill nobreakspace"
)
FUNCTIONS = words(
    "sin cos tan cot sec csc sinh cosh tanh coth sech csch asin acos atan acot asec acsc asinh acosh atanh exp ln log lg "
    "abs sqrt cbrt floor ceil gcd lcm max min Re Im re im arg det gamma Gamma binom factorial sgn erf"
)
TRIGONOMETRIC = words("sin cos tan cot sec csc")
ASCII_FUNCTIONS = {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "ceiling": "ceil", "binomial": "binom", "Abs": "abs",
}  # fmt: skip
GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar triangle angle aleph"
)
CONSTANTS = {"pi": "pi", "Pi": "pi", "e": "e", "i": "i", "inf": "inf", "infty": "inf", "infinity": "inf", "oo": "inf"}

# -- numbers in words

MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: value for value, word in enumerate(_ONES.split())}
NUMBER_WORDS |= {word: 10 * (place + 2) for place, word in enumerate(_TENS.split())}
PARTS = {word: place + 3 for place, word in enumerate(_row("third fourth fifth sixth seventh eighth ninth tenth"))}
PARTS |= {"half": 2, "quarter": 4}
BASE_WORDS = NUMBER_WORDS | {"binary": 2, "octal": 8, "hex": 16}

# -- units


def _units() -> dict[str, tuple[str, Fraction]]:
    table = {
        "length": "1 m meter metre;1/100 cm centimeter centimetre;1/1000 mm millimeter millimetre;1000 km kilometer kilometre;"
        "127/5000 in inch inches;381/1250 ft foot feet;1143/1250 yd yard;201168/125 mi mile",
        "mass": "1 kg kilogram kilo;1/1000 g gram;1/1000000 mg milligram;45359237/100000000 lb lbs pound;"
        "45359237/1600000000 oz ounce",
        "time": "1 s sec second;60 min mins minute;3600 h hr hrs hour;86400 day;604800 week",
        "volume": "1 l liter litre;1/1000 ml milliliter millilitre",
        "money": "1 dollar usd buck;1/100 cent",
        "euro": "1 euro eur",
        "rupee": "1 rupee rs inr",
        "degree": "1 degree deg",
        "angle": "1 rad radian",
        "celsius": "1 celsius",
        "fahrenheit": "1 fahrenheit",
    }
    units = {}
    for dimension, rows in table.items():
        for row in rows.split(";"):
            factor, *names = row.split()
            units |= {name: (dimension, Fraction(factor)) for name in names}
    return units


UNITS = _units()
PERCENT_WORDS = frozenset(("percent", "percents", "pct", "percentage", "percentage points", "per cent"))

# -- words

SHORT_UNIT_WORDS = words(
    "per of km/h m/s ft/s mph kph cup men ways way day pm am sq cu the for rad box boy pen egg hat cat dog"
)
NEGATIONS = words("no not never without less more least most greater fewer than only if unless except from to between")
SAME_WORDS = {
    "does not exist": "dne", "doesnt exist": "dne", "do not exist": "dne", "limit does not exist": "dne",
    "no solution": "none", "no solutions": "none", "no real solution": "none", "no real solutions": "none",
    "empty set": "none", "emptyset": "none", "empty": "none", "nothing": "none",
    "there is no solution": "none", "there are no solutions": "none",
    "cannot determined": "cannot be determined", "cant be determined": "cannot be determined",
    "can not be determined": "cannot be determined", "cannot determine": "cannot be determined",
    "it cannot be determined": "cannot be determined", "not enough information": "cannot be determined",
    "all real numbers": "real line", "all reals": "real line", "real numbers": "real line", "any real number": "real line",
    "infinitely many solutions": "infinitely many", "infinite solutions": "infinitely many",
    "infinite": "infinitely many", "infinite number of solutions": "infinitely many",
}  # fmt: skip
MONTHS = _row("january february march april may june july august september october november december")
_DAYS = _row("monday tuesday wednesday thursday friday saturday sunday")
SHORT_NAMES = {name[:3]: name for name in (*_DAYS, *MONTHS)} | {
    "sept": "september",
    "tues": "tuesday",
    "thurs": "thursday",
}
