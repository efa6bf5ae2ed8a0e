"""The ways of softmax attention over sequence shards: what each moves, where it cannot go, and which one is taken.

    gather    every shard gathers all keys and values (LASP-2H, arXiv 2502.07563)
    window    every shard gets the `window - 1` keys and values in front of it, and nothing else
    ring      keys and values go round, one shard a step; partial results merge by log-sum-exp (arXiv 2310.01889)
    zigzag    the ring on shards that hold an early and a late piece of the row each, so that a causal mask leaves every
              device the same work in every step; tokens change places by four collective-permutes
    heads     tokens and heads change places by all-to-all, every device attends over whole rows (Ulysses, arXiv 2309.14509)
    heads_ring  heads inside groups of neighbours, as many as the heads allow, and a zigzag ring over the groups (USP,
              arXiv 2405.07719)

`ring.py` goes them.
"""

from typing import Literal

Strategy = Literal["gather", "window", "ring", "zigzag", "heads", "heads_ring"]
STRATEGIES: tuple[Strategy, ...] = ("gather", "window", "ring", "zigzag", "heads", "heads_ring")


def bytes_moved(strategy: str, *, tokens: int, heads: int, kv_heads: int, window: int | None, size: int) -> float:
    """Values that a device receives in a forward pass, in units of one head's width, for one row of `tokens` tokens."""
    share = (size - 1) / size
    if strategy == "heads_ring":
        degree = head_degree(heads, kv_heads, size)
        inside = 2 * tokens / size * (degree - 1) / degree * (heads + max(kv_heads, degree))
        shape = {"tokens": tokens, "heads": heads // degree, "kv_heads": max(kv_heads // degree, 1), "window": window}
        return inside + bytes_moved("zigzag", **shape, size=size // degree)
    if strategy == "heads":
        return 2 * tokens / size * share * (heads + max(kv_heads, size))
    if strategy == "window":
        return 2 * kv_heads * min((window or tokens) - 1, tokens)
    own = 2 * tokens / size * share * (heads + kv_heads) if strategy == "zigzag" else 0
    return 2 * kv_heads * tokens * share + own


def choose(*, tokens: int, heads: int, kv_heads: int, window: int | None, size: int) -> Strategy:
    """The strategy that moves least among those that this shape allows.

    Args:
        tokens: of a whole row; a multiple of `size`.
        heads, kv_heads: of one tensor shard.
    """
    if window is not None and window - 1 <= tokens // size * (size - 1) // 2:
        return "window"
    allowed: list[Strategy] = ["zigzag" if tokens % (2 * size) == 0 else "ring"]
    if heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0):
        allowed.insert(0, "heads")
    elif head_degree(heads, kv_heads, size) > 1:
        allowed.append("heads_ring")
    shape = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "window": window, "size": size}
    return min(allowed, key=lambda strategy: bytes_moved(strategy, **shape))


def refusal(strategy: str, *, tokens: int, heads: int, kv_heads: int, window: int | None, size: int) -> str | None:
    """Why this strategy cannot run on this shape; None if it can."""
    if strategy not in STRATEGIES:
        return f"is none of {', '.join(STRATEGIES)}"
    if strategy == "window" and window is None:
        return "needs a window"
    if strategy == "zigzag" and tokens % (2 * size):
        return f"needs rows that are a multiple of 2 * {size} tokens, got {tokens}"
    if strategy == "heads_ring" and head_degree(heads, kv_heads, size) == 1:
        return f"needs a divisor of {size} that divides the {heads} heads of a tensor shard"
    if strategy == "heads":
        if heads % size:
            return f"needs {size} shards to divide the {heads} heads of a tensor shard"
        if kv_heads % size and size % kv_heads:
            return f"needs {size} shards and the {kv_heads} key-value heads of a tensor shard to divide one another"
    return None


def head_degree(heads: int, kv_heads: int, size: int) -> int:
    """The largest number of devices below `size`, a divisor of it, that can trade heads; 1 if there is none."""
    fits = lambda n: size % n == 0 and heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)  # noqa: E731
    return max(n for n in range(1, size) if fits(n))
