"""ListOps (Nangia and Bowman, 2018), in the long form of the Long Range Arena (Tay et al., 2020, Sec. 2.2.1).

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]  ->  5

An expression is an operator with 2 to 10 arguments. An argument is an operator with probability 0.25, else a
digit, and operators nest 9 deep, so that digits are at most at depth 10. The label is the value, one of ten
classes. Brackets are tokens: `[MAX` opens, `]` closes, and each of them counts in the length.

The official lengths are 501 to 1,999 tokens; here both bounds are included, so the default has 500 to 2,000.
The official files hold the same expressions with redundant parentheses around every pair, ( ( [MAX 4 ) 3 ), which
say nothing that the brackets do not say. Here they are no tokens. The first official pipeline dropped brackets as
well, [MAX became MAX and ] nothing; the later one drops parentheses alone, and writes X for ].
"""

if __name__ == "__main__":
    import not_a_command  # noqa: F401

import random
from collections.abc import Iterator

from tqdm import tqdm

from support.cli import UserError

DIGITS = "0123456789"
OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda found: (sorted(found)[(len(found) - 1) // 2] + sorted(found)[len(found) // 2]) // 2,
    "[SM": lambda found: sum(found) % 10,
}  # MED: the whole part of the median; SM: the sum modulo 10
WORDS = [*DIGITS, *OPERATORS, "]"]  # a token is the place of its word here
CODES = {word: code for code, word in enumerate(WORDS)}
FUNCTIONS = [(CODES[word], function) for word, function in OPERATORS.items()]
CLOSE = CODES["]"]

DEPTH, ARGUMENTS, NESTED = 10, 10, 0.25  # of a digit, at most; at most; the probability of an operator
PATIENCE = 10_000  # expressions in a row that are of no use: then there are too few of this length


def expression(rng: random.Random, tokens: bytearray, max_len: int, depth: int = 1) -> int:
    """Append the tokens of a random expression that begins with an operator; its value. depth: of the operator.

    It stops early, with a useless value, when there are more than max_len tokens.
    """
    draw = rng.random
    code, function = FUNCTIONS[int(4 * draw())]
    tokens.append(code)
    values = []
    for _ in range(2 + int((ARGUMENTS - 1) * draw())):
        if depth + 1 < DEPTH and draw() < NESTED:
            values.append(expression(rng, tokens, max_len, depth + 1))
            if len(tokens) > max_len:
                return 0
        else:
            values.append(int(10 * draw()))
            tokens.append(values[-1])  # the token of a digit is the digit
    tokens.append(CLOSE)
    return function(values)


def generate(n: int, min_len: int, max_len: int, seed: int) -> Iterator[tuple[bytes, int]]:
    """n different expressions of min_len to max_len tokens, as (tokens, value), with a bar.

    Only the length selects. So the values have the distribution of the official data: all ten occur, and 0 and 9
    (of MIN and MAX) about twice as often as the others.
    """
    rng, seen, failed = random.Random(seed), set(), 0
    with tqdm(total=n, desc=f"listops, {min_len:,} to {max_len:,} tokens", unit="expr", disable=None) as bar:
        while len(seen) < n:
            tokens = bytearray()
            value = expression(rng, tokens, max_len)
            text = bytes(tokens)
            if not min_len <= len(text) <= max_len or text in seen:
                failed += 1
                if failed == PATIENCE:
                    raise UserError(
                        f"cannot find {n:,} different ListOps expressions of {min_len:,} to {max_len:,} tokens "
                        f"({len(seen):,} found): allow more lengths, or ask for fewer"
                    )
                continue
            failed = 0
            seen.add(text)
            bar.update()
            yield text, value


def parse(text: str) -> bytes:
    """The tokens of an expression in words. Parentheses are left out. KeyError for any other word."""
    return bytes(CODES[word] for word in text.split() if word not in "()")


def words(tokens) -> str:
    """The expression of a row of tokens, in words."""
    return " ".join(WORDS[token] for token in tokens)
