"""The calculator: nanochat's results where it has one, none of its holes, bounded cost, any thread."""

import threading
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from MaxNano.tools import calculator

# Recorded from use_calculator of nanochat at 92d63d4: str of its result, None where it has none.
NANOCHAT = {
    "2+2": "4",
    "1,000+5": "1005",
    "12*12": "144",
    "7/2": "3.5",
    "8/2": "4.0",
    "7//2": "3",
    "-7//2": "-4",
    "2-3": "-1",
    "2--3": "5",
    "2+-3": "-1",
    "-5": "-5",
    "+5": "5",
    "--5": "5",
    "-(3+4)": "-7",
    "(1+2)*3": "9",
    "1+2*3": "7",
    "2*(3+4)*5": "70",
    "10-4-3": "3",
    "100/5/2": "10.0",
    "2*-3": "-6",
    "0.1+0.2": "0.30000000000000004",
    ".5+.5": "1.0",
    "1.": "1.0",
    "1./3": "0.3333333333333333",
    "5.//2": "2.0",
    "1.5*2": "3.0",
    "3*0.25": "0.75",
    "0.0": "0.0",
    "00": "0",
    "000+1": "1",
    "07.5": "7.5",
    "1/3": "0.3333333333333333",
    "2/3*3": "2.0",
    "10/4": "2.5",
    "1,234,567*2": "2469134",
    "12,34": "1234",
    ",5": "5",
    "5,": "5",
    "1,000.50*2": "2001.0",
    "((((1))))": "1",
    "  3 + 4  ": "7",
    "3 +4": "7",
    "48/2": "24.0",
    "48+24": "72",
    "5*12": "60",
    "0.2*50": "10.0",
    "100-50-30-15": "5",
    "12*3*2*52": "3744",
    "(20+5)*.1": "2.5",
    "20*60/100": "12.0",
    "99999999999*99999999999": "9999999999800000000001",
    "0/5": "0.0",
    "-0.0": "-0.0",
    "1.0//0.3": "3.0",
    "6*7.": "42.0",
    "'strawberry'.count('r')": "3",
    '"strawberry".count("r")': "3",
    '"it\'s".count("\'")': "1",
    "'a'.count('')": "2",
    "''.count('a')": "0",
    "'Mississippi'.count('ss')": "2",
    "'hello world'.count('o')": "2",
    " 'abc'.count('c') ": "1",
    "'a,b'.count('b')": "1",
    "'abc'.count(\"b\")": "1",
    "'abc'.count('d')": "0",
    "": None,
    "1/0": None,
    "1//0": None,
    "2**3": None,
    "2*,*3": None,
    "2* *3": None,
    "2 3": None,
    "(1)(2)": None,
    "007": None,
    "1.5.3": None,
    "1+": None,
    "*1": None,
    "/2": None,
    "(1": None,
    "1)": None,
    "1..2": None,
    ".": None,
    "-": None,
    "abc": None,
    "2^3": None,
    "5%2": None,
    "5%": None,
    "$5*2": None,
    "1+1=": None,
    "x+1": None,
    "3>2": None,
    "1_000": None,
    "0x10": None,
    "1e5": None,
    "3\u00a0+4": None,
    "'abc'.count(b)": None,
    "'abc'.upper()": None,
    "'aaa'.count('a')+1": None,
    "'abcabc'.count('a',1)": None,
    "'a'.count('a'": None,
    "'hello' . count ('l')": None,
    "__import__('os').system('id')": None,
}
# Where MaxNano means to differ: nanochat's result, MaxNano's.
DIFFERENT = {
    "'a,b'.count(',')": ("3", "1"),  # nanochat deletes commas inside quotes too
    "'1,2,3'.count(',')": ("4", "2"),
    "'profile'.count('p')": (None, "1"),  # it refuses words that hold file, dir, open, input, ...
    "'direct'.count('r')": (None, "1"),
    "'a-b'.count('-')": (None, "1"),
    "'naïve'.count('v')": (None, "1"),
    "()": ("()", None),  # Python that is no arithmetic
    "...": ("Ellipsis", None),
    "'abc'.count('a').real": ("1", None),  # methods other than count, by which memory can be filled
    "'abc'.ljust(5).count(' ')": ("2", None),
}


@pytest.mark.parametrize("expression", NANOCHAT)
def test_results_are_nanochats(expression):
    assert calculator.calculate(expression) == NANOCHAT[expression]


@pytest.mark.parametrize("expression", DIFFERENT)
def test_meant_differences(expression):
    nanochat, ours = DIFFERENT[expression]
    assert calculator.calculate(expression) == ours != nanochat


def nanochat_arithmetic(expression):
    """What nanochat does with an expression of these characters, its time limit aside."""
    expression = expression.replace(",", "")
    if "**" in expression:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            result = eval(expression, {"__builtins__": {}}, {})
    except Exception:
        return None
    return str(result) if type(result) in (int, float) else None


numbers = st.from_regex(r"[0-9]{1,4}(\.[0-9]{0,2})?|\.[0-9]{1,2}", fullmatch=True)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", " - ", " * "]), inner),
        st.tuples(st.sampled_from(["-", "+", "- "]), inner),
        st.tuples(st.just("("), inner, st.just(")")),
    ).map("".join),
    max_leaves=12,
)


@given(expressions | st.text("0123456789*+-/.(), ", max_size=30))
def test_arithmetic_is_pythons(expression):
    assert calculator.calculate(expression) == nanochat_arithmetic(expression)


@given(st.text(max_size=300) | st.text("'\"abr.count(), \\\n", max_size=40))
def test_any_text_is_answered(text):
    result = calculator.calculate(text)
    assert result is None or isinstance(result, str)


quotable = st.text(st.characters(exclude_characters="'\\\n", codec="utf-8"), max_size=60)


@given(quotable, quotable)
def test_counts_what_is_quoted(text, part):
    assert calculator.calculate(f"'{text}'.count('{part}')") == str(text.count(part))


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "'a'.ljust(500000000).count('a')",
        "1+" * calculator.MAX_LENGTH + "1",
        "9" * (calculator.MAX_DIGITS + 1),
        "(" * 90 + "1" + ")" * 90,
        "-" * 150 + "1",
        "'" + "a" * 1_000_000 + "'.count('a')",
    ],
)
def test_what_could_cost_is_refused(expression):
    assert calculator.calculate(expression) is None


def test_the_longest_numbers_are_still_exact():
    nines = "9" * calculator.MAX_DIGITS
    assert calculator.calculate(f"{nines[1:]}*{nines[1:]}") == str(int(nines[1:]) ** 2)


def test_works_off_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(calculator.calculate("6*7")))
    thread.start()
    thread.join()
    assert results == ["42"]
