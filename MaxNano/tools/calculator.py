"""The calculator tool: arithmetic on numbers, and counting letters in a word."""

import re

# This also bounds the size of the result: without powers it has no more digits than the text.
MAX_LENGTH = 200  # characters of an expression
MAX_DEPTH = 50  # nesting of parentheses and signs
MAX_DIGITS = 100  # characters of one number

_TOKEN = re.compile(r" *(?:([0-9]+\.?[0-9]*|\.[0-9]+)|(//|[-+*/()]))")
_QUOTED = r"""(?:'([^'\\\n]*)'|"([^"\\\n]*)")"""
_COUNT = re.compile(rf" *{_QUOTED} *\.count\( *{_QUOTED} *\) *")


def calculate(expression: str) -> str | None:
    """The result of an expression as Python prints it, or None if it has none.

    Supports `+ - * / //`, signs and parentheses on decimal numbers, which may have commas between
    thousands, and `'text'.count('part')`. Returns None for anything else (such as powers and
    names), for an expression that is too long or too deep, and for a division by zero. Nothing is
    evaluated as Python, so the cost is bounded and any thread may call it.
    Source: nanochat/engine.py@92d63d4, use_calculator. Unlike nanochat, commas inside quotes are
    kept and words such as 'profile' are allowed.
    """
    if len(expression) > MAX_LENGTH:
        return None
    if count := _COUNT.fullmatch(expression):
        text, part = (
            single if single is not None else double
            for single, double in (count.group(1, 2), count.group(3, 4))
        )
        return str(text.count(part))
    try:
        return str(_Arithmetic(expression.replace(",", "")).value())
    except (ValueError, ArithmeticError):
        return None


class _Arithmetic:
    """A recursive-descent parser with Python's precedence; each method consumes its tokens.

    Every method raises ValueError if the text is not an expression.
    """

    def __init__(self, text: str):
        self.tokens = []  # numbers as int or float, operators as str; in reverse order
        position, text = 0, text.rstrip(" ")
        while position < len(text):
            if not (token := _TOKEN.match(text, position)):
                raise ValueError(f"no number or operator at {text[position:]!r}")
            self.tokens.append(_number(token[1]) if token[1] else token[2])
            position = token.end()
        self.tokens.reverse()

    def value(self) -> int | float:
        """The value of the whole text."""
        value = self._sum(0)
        if self.tokens:
            raise ValueError(f"nothing may follow the expression, got {self.tokens[-1]!r}")
        return value

    def _take(self, *operators: str) -> str | None:
        """Consume and return the next token if it is one of these operators."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in operators else None

    def _sum(self, depth: int) -> int | float:
        value = self._product(depth)
        while operator := self._take("+", "-"):
            other = self._product(depth)
            value = value + other if operator == "+" else value - other
        return value

    def _product(self, depth: int) -> int | float:
        value = self._factor(depth)
        while operator := self._take("*", "/", "//"):
            other = self._factor(depth)
            if operator == "*":
                value = value * other
            else:
                value = value / other if operator == "/" else value // other
        return value

    def _factor(self, depth: int) -> int | float:
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} nested parentheses and signs")
        if sign := self._take("+", "-"):
            value = self._factor(depth + 1)
            return -value if sign == "-" else value
        if self._take("("):
            value = self._sum(depth + 1)
            if not self._take(")"):
                raise ValueError("a parenthesis is not closed")
            return value
        if not self.tokens or isinstance(self.tokens[-1], str):
            raise ValueError("a number is missing")
        return self.tokens.pop()


def _number(text: str) -> int | float:
    """Parse a decimal number; as in Python, a nonzero integer has no leading zero."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    if "." in text:
        return float(text)
    if text[0] == "0" and text.strip("0"):
        raise ValueError(f"a leading zero in {text}")
    return int(text)
