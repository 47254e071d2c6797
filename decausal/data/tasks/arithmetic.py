"""Tasks that compute: addition column by column, small Python expressions, one-step word problems."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
ITEMS = ("pens", "eggs", "cards", "books", "coins", "shells", "apples", "stamps")

ADDING = (
    "{name} has {a} {items} and gets {b} more. How many now?",
    "{name} has {a} {items}, {other} has {b}. How many in all?",
    "{a} {items} lie here and {b} lie there. How many in all?",
)
TAKING = (
    "{name} has {a} {items} and loses {b}. How many are left?",
    "{name} had {a} {items} and gave {other} {b}. How many are left?",
    "{name} has {a} {items}, {other} has {b}. How many more has {name}?",
)
GROUPING = (
    "{name} has {a} bags of {b} {items}. How many in all?",
    "{a} boxes hold {b} {items} each. How many in all?",
)
SHARING = (
    "{name} puts {a} {items} into {b} equal bags. How many in each?",
    "{a} {items} are shared by {b}. How many does each get?",
)


def addition(random: Random, size: int) -> tuple[str, str]:
    """`add 347+586:` gives `7+6=13 4+8+1=13 3+5+1=9 =933`: one column per step, from the right; `size` digits each."""
    first, second = (random.randrange(10 ** (size - 1), 10**size) for _ in range(2))
    steps, carry = [], 0
    for place in range(size):
        upper, lower = (number // 10**place % 10 for number in (first, second))
        column = upper + lower + carry
        steps.append(f"{upper}+{lower}+{carry}={column}" if place else f"{upper}+{lower}={column}")
        carry = column // 10
    return f"add {first}+{second}:", f"{' '.join(steps)} ={first + second}"


def python(random: Random, size: int) -> tuple[str, str]:
    """`python 3+4*2:` gives `3+8=11`: the value of a Python expression with numbers of at most `size`."""
    kind = random.choice((_product_first, _parentheses, _comparison, _extreme, _length, _item))
    expression, written = kind(random, size)
    return f"python {expression}:", written


def word_problem(random: Random, size: int) -> tuple[str, str]:
    """`Ann has 12 pens and gets 7 more. How many now?` gives `12+7=19`; sums and products of numbers up to `size`."""
    name, other = random.sample(NAMES, 2)
    sign = random.choice("+-*/")
    small, large = sorted(random.randint(2, size) for _ in range(2))
    few, each = random.randint(2, 9), random.randint(2, 9)
    templates, a, b, result = {
        "+": (ADDING, large, small, large + small),
        "-": (TAKING, large + 1, small, large + 1 - small),
        "*": (GROUPING, few, each, few * each),
        "/": (SHARING, few * each, few, each),
    }[sign]
    if sign == "+" and random.random() < 0.5:
        a, b = b, a
    prompt = random.choice(templates).format(name=name, other=other, items=random.choice(ITEMS), a=a, b=b)
    return prompt, f"{a}{sign}{b}={result}"


def _product_first(random: Random, size: int) -> tuple[str, str]:
    a, b, c = (random.randint(2, size) for _ in range(3))
    sign = random.choice("+-")
    if random.random() < 0.5:
        return f"{a}{sign}{b}*{c}", f"{a}{sign}{b * c}={a + b * c if sign == '+' else a - b * c}"
    return f"{a}*{b}{sign}{c}", f"{a * b}{sign}{c}={a * b + c if sign == '+' else a * b - c}"


def _parentheses(random: Random, size: int) -> tuple[str, str]:
    a, b, c = (random.randint(2, size) for _ in range(3))
    inner, sum_or_difference = random.choice(((f"{a}+{b}", a + b), (f"{a}-{b}", a - b)))
    return f"({inner})*{c}", f"{sum_or_difference}*{c}={sum_or_difference * c}"


def _comparison(random: Random, size: int) -> tuple[str, str]:
    a, b, c = (random.randint(2, size) for _ in range(3))
    c += random.randint(0, size)
    if random.random() < 0.5:
        return f"{a}+{b}<{c}", f"{a + b}<{c}={a + b < c}"
    return f"{a}+{b}>{c}", f"{a + b}>{c}={a + b > c}"


def _extreme(random: Random, size: int) -> tuple[str, str]:
    numbers = [random.randint(0, 9 * size) for _ in range(random.randint(2, 3))]
    listed = ",".join(map(str, numbers))
    return random.choice(((f"max({listed})", str(max(numbers))), (f"min({listed})", str(min(numbers)))))


def _length(random: Random, size: int) -> tuple[str, str]:
    word = _word(random, random.randint(2, size))
    return f"len('{word}')", str(len(word))


def _item(random: Random, size: int) -> tuple[str, str]:
    word = _word(random, random.randint(2, min(size, 6)))
    index = random.randrange(len(word))
    return f"'{word}'[{index}]", word[index]


def _word(random: Random, length: int) -> str:
    return "".join(random.choice(ascii_lowercase) for _ in range(length))
