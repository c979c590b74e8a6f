"""How far two answers to one request are from each other, token by token.

Tokens are compared as long as both answers had the same context: up to and including the first that differs. There both
servers' distributions are conditional on the same words, and they are those of serving itself: decode is not clipped,
which it would be if a whole answer were put into the prompt to score it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TINY = 1e-6  # of probability: sums of rounded ones are no nearer to 1


@dataclass(frozen=True)
class Token:
    """A token of an answer. text: its bytes, as text; logprob: of it; top: of the most likely ones, it included."""

    text: str
    logprob: float
    top: Mapping[str, float]


@dataclass(frozen=True)
class Pair:
    """`other` against `base`. tokens: how many could be compared; divergence: KL(base || other), nats per token; drop:
    by how much base's own tokens are less likely, nats per token; first: the first differing token, from 0, or None.
    """

    tokens: int
    divergence: float
    drop: float
    first: int | None


def compare(base: Sequence[Token], other: Sequence[Token]) -> Pair:
    """Two greedy answers. Where one ends and the other goes on, that is a difference, too."""
    divergences, drops = [], []
    first = None
    for i, (a, b) in enumerate(zip(base, other, strict=False)):
        divergences.append(divergence(a.top, b.top))
        drops.append(a.logprob - b.top.get(a.text, min(b.top.values())))
        if a.text != b.text:
            first = i
            break
    if first is None and len(base) != len(other):
        first = min(len(base), len(other))
    count = len(divergences)
    return Pair(count, sum(divergences) / max(count, 1), sum(drops) / max(count, 1), first)


def divergence(base: Mapping[str, float], other: Mapping[str, float]) -> float:
    """A lower bound of KL(base || other) from the log-probabilities of both's most likely tokens; exact but for tokens
    that neither lists, where both list the same.

    Tokens that both list count one by one, all others together. Those that only `base` lists are kept apart: `other`
    gives them at most the probability of its last listed one each, and of what makes the least of it we take that.
    """
    p, q = ({token: math.exp(value) for token, value in side.items()} for side in (base, other))
    both = p.keys() & q.keys()
    only = p.keys() - q.keys()
    left_p, left_q = (max(1 - sum(side[token] for token in both), TINY) for side in (p, q))
    own = min(sum(p[token] for token in only), left_p)
    most = min(len(only) * min(q.values()), left_q)
    theirs = min(most, left_q * own / left_p)
    total = sum(p[token] * (base[token] - other[token]) for token in both)
    total += _term(own, theirs) + _term(left_p - own, left_q - theirs)
    return max(total, 0.0)


def _term(p: float, q: float) -> float:
    return p * math.log(p / max(q, TINY)) if p > TINY else 0.0
