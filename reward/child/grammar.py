"""A parser of the mathematics found in final answers: LaTeX and calculator notation into one small tree.

Nothing is evaluated here. The tree of an answer is what `values` computes with and `equivalence` compares; what this
grammar cannot read in full raises Unreadable, so no verdict rests on a part of an answer.
"""

from __future__ import annotations

from reward.child.tables import ASCII_FUNCTIONS, BASE_WORDS, CONSTANTS, FUNCTIONS, GREEK, TRIGONOMETRIC
from reward.child.tokens import Token, tokenize
from reward.child.tree import Node, Unreadable, based, number, repeating

MAX_DEPTH = 40
_RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "\\le": "<=", "\\ge": ">=", "\\ne": "!=",
    "\\in": "in", "\\approx": "~", "\\equiv": "=", "\\sim": "=", "\\notin": "notin", "in": "in", "\\ni": "ni",
}  # fmt: skip
_SET_OPERATORS = {"\\cup": "union", "\\cap": "intersection", "\\setminus": "difference"}
_SEPARATORS = {",", ";", "or", "and", "\\vee", "\\wedge", "&"}
_CLOSERS = {"(": ")]", "[": "])"}


def parse(text: str) -> Node:
    """The tree of an answer in canonical notation. Raise Unreadable unless all of it is understood."""
    parser = _Parser(tokenize(text))
    try:
        node = parser.statement()
    except (RecursionError, ZeroDivisionError, IndexError) as error:
        raise Unreadable(type(error).__name__) from error
    if parser.peek() is not None:
        raise Unreadable(f"{parser.tokens[parser.at].text!r} was not expected")
    return node


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0

    # -- tokens

    def peek(self, ahead: int = 0) -> str | None:
        return self.tokens[self.at + ahead].text if self.at + ahead < len(self.tokens) else None

    def kind(self, ahead: int = 0) -> str | None:
        return self.tokens[self.at + ahead].kind if self.at + ahead < len(self.tokens) else None

    def take(self) -> Token:
        if self.at >= len(self.tokens):
            raise Unreadable("it ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def accept(self, text: str) -> bool:
        if self.peek() == text:
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise Unreadable(f"{text!r} expected, found {self.peek()!r}")

    # -- structures

    def statement(self, stops: str = "") -> Node:
        """Relations or expressions, listed by commas, semicolons, "and", "or"."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        items, separators = [self.relation()], set[str]()
        while (text := self.peek() or "") in _SEPARATORS:
            while self.peek() in _SEPARATORS:
                separators.add(self.take().text)
            if text in (",", ";") and (self.peek() is None or (self.peek() or "?") in stops):
                break
            items.append(self.relation())
        self.depth -= 1
        if len(items) == 1:
            return items[0]
        disjunction = bool(separators & {"or", "\\vee"})
        return Node("list", tuple(items), "or" if disjunction else "and" if not separators & {",", ";"} else ",")

    def relation(self) -> Node:
        # A leading sign of approximation or equality belongs to a left side that was left out.
        if self.peek() in ("=", "\\approx", "\\sim"):
            self.take()
        operands, operators = [self.set_expression()], []
        while (operator := _RELATIONS.get(self.peek() or "")) is not None:
            self.take()
            operators.append(operator)
            operands.append(self.set_expression())
        return Node("rel", tuple(operands), tuple(operators)) if operators else operands[0]

    def set_expression(self) -> Node:
        if self.peek() == ":" or self.peek() is None:
            raise Unreadable("an expression was expected")
        left = self.ratio()
        while (operator := _SET_OPERATORS.get(self.peek() or "")) is not None:
            self.take()
            left = Node(operator, (left, self.ratio()))
        return left

    def ratio(self) -> Node:
        parts = [self.sum()]
        while self.peek() == ":" and self.peek(1) is not None and self.bars >= 0:
            self.take()
            parts.append(self.sum())
        return Node("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    def sum(self) -> Node:
        terms: list[Node] = []
        if self.peek() in ("\\pm", "\\mp"):
            sign = self.take().text
            terms.append(Node("pm", (self.product(),), sign))
        else:
            terms.append(self.product())
        while (sign := self.peek()) in ("+", "-", "\\pm", "\\mp"):
            self.take()
            if sign == "+" and self.accept("/"):
                self.expect("-")
                sign = "\\pm"
            term = self.product()
            if sign == "-" and term.head == "set" and len(terms) == 1:
                terms = [Node("difference", (terms[0], term))]
                continue
            terms.append(term if sign == "+" else Node("neg", (term,)) if sign == "-" else Node("pm", (term,), sign))
        return Node("add", tuple(terms)) if len(terms) > 1 else terms[0]

    def product(self) -> Node:
        result = self.signed()
        while True:
            text = self.peek()
            if text in ("*", "\\cdot", "\\times"):
                self.take()
                right = self.signed()
                if text == "\\times" and result.head in ("interval", "tuple", "set", "field"):
                    raise Unreadable("a product of sets")
                result = Node("mul", (result, right))
            elif text in ("/", "\\div"):
                self.take()
                right = self.signed()
                # "3/4%" is a percentage of three quarters, not three over four percent.
                percent = right.head == "percent"
                result = Node("div", (result, right.args[0] if percent else right))
                result = Node("percent", (result,)) if percent else result
            elif self.starts_factor():
                result = self.juxtaposed(result)
            else:
                return result

    def juxtaposed(self, left: Node) -> Node:
        token = self.tokens[self.at]
        if token.kind in ("number", "repeating") and left.head != "pow" and left.data != "factorial":
            raise Unreadable("a number after a value without a sign between")
        inverse = left.head == "pow" and left.args[0].head == "sym" and left.args[1] == Node("neg", (number("1"),))
        called = (left.head == "sym" or inverse) and token.text == "(" and not token.spaced
        right = self.power()
        if "phrase" in (left.head, right.head) or right.head in ("set", "interval", "list"):
            raise Unreadable("words inside a product")
        if left.head == "tuple" or (right.head == "tuple" and not called):
            raise Unreadable("a product of tuples")
        return Node("mul", (left, right), "call" if called else None)

    def starts_factor(self) -> bool:
        text, kind = self.peek(), self.kind()
        if text is None:
            return False
        if kind in ("number", "repeating", "name", "field"):
            return True
        if kind == "env":
            return text == "\\begin"
        if kind == "command":
            return text[1:] in FUNCTIONS or text[1:] in GREEK or text[1:] in CONSTANTS or text[1:] in _ATOMS
        return text in ("(", "[", "{") or (text == "|" and self.bars == 0)

    def signed(self) -> Node:
        if self.accept("-"):
            return Node("neg", (self.signed(),))
        if self.accept("+"):
            if self.accept("/"):
                self.expect("-")
                return Node("pm", (self.signed(),), "\\pm")
            return self.signed()
        return self.power()

    def power(self) -> Node:
        base = self.atom()
        while True:
            text = self.peek()
            if text in ("^", "**"):
                self.take()
                base = self.raised(base)
            elif text == "!" and self.peek(1) != "!":
                self.take()
                base = Node("fn", (base,), "factorial")
            elif text == "%":
                self.take()
                base = Node("percent", (base,))
            elif text == "'" and base.head == "sym":
                self.take()
                base = Node("sym", (), base.data + "'")
            else:
                return base

    def raised(self, base: Node) -> Node:
        """The base with its exponent: a group, or one atom with a sign; powers without groups nest to the right."""
        if self.accept("\\circ"):
            return Node("degree", (base,))
        if self.peek() == "{" and self.peek(1) in ("\\circ", "o") and self.peek(2) == "}":
            self.at += 3
            return Node("degree", (base,))
        if self.accept("-"):
            exponent = Node("neg", (self.atom(),))
        elif self.accept("+"):
            exponent = self.atom()
        else:
            exponent = self.atom()
        if self.peek() in ("^", "**"):
            self.take()
            exponent = self.raised(exponent)
        if exponent.head == "phrase":
            raise Unreadable("words in an exponent")
        return Node("pow", (base, exponent))

    # -- atoms

    def atom(self) -> Node:
        token = self.take()
        match token.kind:
            case "number":
                return self.numeral(token)
            case "repeating":
                return repeating(token.text)
            case "field":
                return Node("field", (), token.text)
            case "phrase":
                return Node("phrase", (), token.text)
            case "name":
                return self.name(token.text)
            case "env":
                return self.matrix()
        text = token.text
        if text in ("(", "[", "{", "\\{"):
            return self.bracketed(text)
        if text == "|":
            self.bars += 1
            inner = self.sum()
            self.bars -= 1
            self.expect("|")
            return Node("fn", (inner,), "abs")
        if text.startswith("\\"):
            return self.command(text[1:])
        raise Unreadable(f"{text!r} was not expected")

    def numeral(self, token: Token) -> Node:
        """A number; with a base (`101_2`); or the whole part of a mixed number (`1\\frac{1}{2}`, `1 1/2`)."""
        if self.peek() == "_" and "." not in token.text:
            self.take()
            base = self.single_argument()
            return _in_base(token.text, base)
        literal = number(token.text)
        if "." in token.text:
            return literal
        if self.peek() == "\\frac":
            mark = self.at
            fraction = self.atom()
            top, bottom = fraction.args
            plain = top.head == bottom.head == "num" and "." not in top.data[1] + bottom.data[1]
            if plain and 0 < top.data[0] < bottom.data[0] and self.peek() not in ("^", "!"):
                return Node("add", (literal, fraction), "mixed")
            self.at = mark
        elif self.kind() == "number" and self.peek(1) == "/" and self.kind(2) == "number":
            top, bottom = number(self.take().text), (self.take(), number(self.take().text))[1]
            if not 0 < top.data[0] < bottom.data[0]:
                raise Unreadable("two numbers side by side")
            return Node("add", (literal, Node("div", (top, bottom))), "mixed")
        return literal

    def name(self, text: str) -> Node:
        text = ASCII_FUNCTIONS.get(text, text)
        if text in FUNCTIONS and not (text in GREEK and self.peek() != "("):
            return self.function(text)
        if text in CONSTANTS:
            return Node("const", (), CONSTANTS[text])
        if self.peek() == "_":
            self.take()
            text += "_" + _flat(self.single_argument())
        return Node("sym", (), text)

    def single_argument(self) -> Node:
        """What a subscript or an unbraced argument takes: a group, or one token."""
        if self.peek() in ("{", "("):
            return self.atom()
        token = self.take()
        if token.kind == "number":
            return number(token.text)
        if token.kind in ("name", "phrase"):
            return Node("const" if token.text in ("e", "pi") else "sym", (), token.text)
        raise Unreadable(f"{token.text!r} as a subscript")

    def bracketed(self, opening: str) -> Node:
        if opening in ("{", "\\{"):
            return self.braced("}" if opening == "{" else "\\}", explicit=opening == "\\{")
        closers = _CLOSERS[opening]
        bars, self.bars = self.bars, 0
        if (self.peek() or "?") in closers:
            raise Unreadable("empty brackets")
        inner = self.statement(closers)
        self.bars = bars
        closing = self.take().text
        if closing not in (")", "]"):
            raise Unreadable(f"{closing!r} closes {opening!r}")
        kind = opening + closing
        if inner.head != "list" or inner.data not in (",",):
            if kind == "()" or (kind == "[]" and inner.head != "list"):
                return inner
            raise Unreadable("an interval of one end")
        if kind == "[]" and all(item.head in ("tuple", "set", "interval") for item in inner.args):
            return inner  # a list of points
        if len(inner.args) == 2 and kind != "()":
            return Node("interval", inner.args, kind)
        if kind not in ("()", "[]"):
            raise Unreadable("an interval of more than two ends")
        return Node("tuple", inner.args, None if kind == "()" else kind)

    def braced(self, closing: str, *, explicit: bool) -> Node:
        bars, self.bars = self.bars, -1 if explicit else 0
        if self.accept(closing):
            self.bars = bars
            return Node("set") if explicit else Node("phrase", (), "")
        inner = self.statement(closing)
        if self.peek() in ("|", ":"):
            self.take()
            inner = self.statement(closing)
            self.bars = bars
            self.expect(closing)
            return inner
        self.bars = bars
        self.expect(closing)
        if explicit or (inner.head == "list" and inner.data == ","):
            return Node("set", inner.args if inner.head == "list" else (inner,))
        return inner

    def matrix(self) -> Node:
        environment = self.take().text
        if environment == "cases":
            return self.cases()
        if environment not in ("pmatrix", "bmatrix", "vmatrix", "matrix", "array", "smallmatrix", "Bmatrix"):
            raise Unreadable(f"environment {environment}")
        if environment == "array" and self.accept("{"):
            while not self.accept("}"):
                self.take()
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while True:
            if self.peek() == "\\end":
                self.at += 2
                break
            row.append(self.sum())
            text = self.peek()
            if text == "&":
                self.take()
            elif text == "\\\\":
                self.take()
                rows.append(tuple(row))
                row = []
            elif text != "\\end":
                raise Unreadable("a matrix cell that is not an expression")
        if row:
            rows.append(tuple(row))
        if not rows or len({len(row) for row in rows}) != 1:
            raise Unreadable("a matrix with ragged rows")
        return (
            Node("fn", (Node("matrix", tuple(rows)),), "det")
            if environment == "vmatrix"
            else Node("matrix", tuple(rows))
        )

    def cases(self) -> Node:
        """Equations that hold together, one a row."""
        items = [self.relation()]
        while self.peek() in ("\\\\", ","):
            self.take()
            if self.peek() != "\\end":
                items.append(self.relation())
        self.expect("\\end")
        self.take()
        return Node("list", tuple(items), "and") if len(items) > 1 else items[0]

    def command(self, name: str) -> Node:
        if name in ("frac", "binom"):
            top, bottom = self.fraction_argument(), self.fraction_argument()
            return Node("div" if name == "frac" else "fn", (top, bottom), None if name == "frac" else "binom")
        if name == "sqrt":
            return self.function(name)
        if name in FUNCTIONS:
            return self.name(name)
        if name in GREEK or name in CONSTANTS:
            return self.name(name)
        if name == "emptyset":
            return Node("set")
        if name == "langle":
            inner = self.statement("\\rangle")
            self.expect("\\rangle")
            return Node("tuple", inner.args if inner.head == "list" else (inner,))
        if name in ("lfloor", "lceil"):
            inner = self.sum()
            self.expect("\\r" + name[1:])
            return Node("fn", (inner,), name[1:])
        if name == "overline":
            return self.atom()
        raise Unreadable(f"\\{name}")

    def fraction_argument(self) -> Node:
        r"""`\frac12` is one half: an unbraced argument is one digit."""
        if self.kind() == "number":
            token = self.take()
            if len(token.text) > 1:
                self.at -= 1
                self.tokens[self.at] = token._replace(text=token.text[1:])
            return number(token.text[0])
        return self.atom()

    def function(self, name: str) -> Node:
        exponent, extra = None, None
        if name == "sqrt" and self.accept("["):
            extra = self.sum()
            self.expect("]")
        while self.peek() in ("^", "_"):
            if self.take().text == "_":
                extra = self.single_argument()
            elif self.accept("-"):
                exponent = Node("neg", (self.atom(),))
            else:
                exponent = self.atom()
        if name == "log" and self.kind() == "number" and self.peek(1) == "(" and not self.tokens[self.at].spaced:
            extra = number(self.take().text)  # log2(8)
        argument = self.function_argument(name)
        if name == "log" and extra is not None:
            node = Node("fn", (*argument, extra), "log")
        elif name == "sqrt":
            node = Node("fn", (*argument, extra or number("2")), "root")
        else:
            if extra is not None:
                raise Unreadable(f"a subscript of {name}")
            node = Node("fn", argument, name)
        if exponent is None:
            return node
        inverse = exponent == Node("neg", (number("1"),))
        if inverse and name in TRIGONOMETRIC:
            return node._replace(data="a" + name)
        return Node("pow", (node, exponent))

    def function_argument(self, name: str) -> tuple[Node, ...]:
        text = self.peek()
        if text in ("(", "{", "["):
            inner = self.atom()
            if inner.head in ("tuple", "interval", "set"):
                return inner.args
            return (inner,)
        if name == "sqrt":
            return (self.atom(),)
        factors = [self.signed()]
        while self.starts_factor() and self.kind() not in ("number", "repeating"):
            if (self.peek() or "").lstrip("\\") in FUNCTIONS or self.peek() in ("(", "[", "|"):
                break
            factors.append(self.power())
        node = factors[0]
        for factor in factors[1:]:
            node = Node("mul", (node, factor))
        return (node,)


_ATOMS = frozenset(["frac", "binom", "sqrt", "langle", "lfloor", "lceil", "overline"])


def _flat(node: Node) -> str:
    if node.head == "num":
        return node.data[1]
    if node.head in ("sym", "const", "phrase"):
        return str(node.data)
    return node.head + "".join(_flat(argument) for argument in node.args)


def _in_base(digits: str, base: Node) -> Node:
    value = int(base.data[0]) if base.head == "num" else BASE_WORDS.get(str(base.data).replace("base ", ""), 0)
    return based(digits, value)
