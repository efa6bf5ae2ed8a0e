"""Addresses of Engram (arXiv 2601.07372): token compression, n-gram hashing and the prime sizes of its tables.

Everything is exact 64-bit integer arithmetic. `ngram_rows` is one function for NumPy (data pipelines, exports) and
for JAX, where it runs inside a 64-bit island of an otherwise 32-bit program.
"""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SPACES = re.compile(r"[ \t\r\n]+")
# The white space of Unicode. `str.strip` would also take the four separators at U+001C to U+001F.
_STRIPPED = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_HELD_SPACE = "\ue000"
_PARTIAL = "\ufffd"
_LAYER_STRIDE = 10_007


@dataclasses.dataclass(frozen=True)
class NgramTables:
    """Sizes of the hash tables of one layer, and where each begins in the layer's flat table.

    Attributes:
        primes: rows of each head's table, `primes[order][head]`; orders are 2, 3, ....
    """

    primes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of every table in (order, head) order."""
        return tuple(size for order in self.primes for size in order)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of every table in the flat table."""
        return tuple(int(start) for start in np.cumsum((0, *self.sizes), dtype=np.int64)[:-1])

    @property
    def num_rows(self) -> int:
        return sum(self.sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class NgramHash:
    """Everything that decides the rows of one layer, in host memory: its tables, constants and rules.

    Attributes:
        tables: sizes of the hash tables.
        words_N2: multipliers, split by `split_words`.
        token_map_V: compressed id of every token id; None where tokens keep theirs.
        pad_token_id: token id read where an n-gram has no token, before compression.
        cross_document: as in `ngram_rows`.
    """

    tables: NgramTables
    words_N2: np.ndarray
    token_map_V: np.ndarray | None
    pad_token_id: int
    cross_document: bool

    @property
    def pad_id(self) -> int:
        return self.pad_token_id if self.token_map_V is None else int(self.token_map_V[self.pad_token_id])

    def compressed(self, token_ids_BT: np.ndarray) -> np.ndarray:
        """Compressed ids; a negative id is no token and stays negative."""
        if self.token_map_V is None:
            return token_ids_BT
        return np.where(token_ids_BT < 0, token_ids_BT, self.token_map_V[np.maximum(token_ids_BT, 0)])

    def rows(self, token_ids_BT: np.ndarray, segment_ids_BT: np.ndarray) -> Any:
        """Rows of the flat table, as `ngram_rows` gives them, (B, T, S), of whole rows of tokens."""
        arguments = (self.compressed(token_ids_BT), segment_ids_BT, self.words_N2, self.tables)
        return ngram_rows(*arguments, pad_id=self.pad_id, cross_document=self.cross_document)

    def ngrams(self, token_ids_BT: np.ndarray, segment_ids_BT: np.ndarray) -> list[np.ndarray]:
        """Number of the n-gram at every token, for each order 2, 3, ...: (B, T) int64, equal for equal n-grams; -1 at padding."""
        ids_BT = self.compressed(token_ids_BT)
        slots = _slots(np, ids_BT, segment_ids_BT, len(self.tables.primes), self.pad_id, self.cross_document)
        is_token, numbers, found = _is_token(ids_BT, segment_ids_BT), None, []
        for slot_BT in slots:
            slot_BT = slot_BT.astype(np.int64)
            if numbers is None:
                numbers = slot_BT
                continue
            # Numbered by what the last order was and the new slot: both are small, whatever n is.
            key = numbers * (int(slot_BT.max(initial=0)) + 1) + slot_BT
            numbers = np.unique(key, return_inverse=True)[1].reshape(key.shape)
            found.append(np.where(is_token, numbers, -1))
        return found


def compression_map(texts: Sequence[str], raw_tokens: Sequence[str] | None = None) -> np.ndarray:
    """Compressed id of every token id, (V,) int32: tokens whose normalized texts agree share one.

    Args:
        texts: each token id decoded on its own.
        raw_tokens: the vocabulary's own spelling of each token. A token whose text holds U+FFFD is part of a
            character and keeps its own spelling as key; without spellings it shares its id with no other token.
    """
    ids: dict[Any, int] = {}
    compressed = np.empty(len(texts), np.int32)
    for token, text in enumerate(texts):
        own_key = token if raw_tokens is None else raw_tokens[token]
        key = own_key if _PARTIAL in text else normalized(text) or text
        compressed[token] = ids.setdefault(key, len(ids))
    return compressed


def normalized(text: str) -> str:
    """NFKC, NFD, no combining marks, lower case, one space for each run of white space, stripped at both ends.

    A text that comes down to exactly one space stays one space.
    """
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(char for char in text if not unicodedata.category(char).startswith("M"))
    # Character by character: `str.lower` would choose the final form of a sigma by its neighbours.
    text = _SPACES.sub(" ", "".join(char.lower() for char in text))
    if text == " ":
        text = _HELD_SPACE
    return text.strip(_STRIPPED).replace(_HELD_SPACE, " ")


def multipliers(num_compressed: int, max_ngram: int, layer_id: int, seed: int = 0) -> np.ndarray:
    """One odd int64 per shift 0 .. max_ngram - 1, small enough that id * multiplier stays below 2^63."""
    half = max(1, (2**63 - 1) // num_compressed // 2)
    rng = np.random.default_rng(seed + _LAYER_STRIDE * layer_id)
    return 2 * rng.integers(0, half, size=max_ngram, dtype=np.int64) + 1


def split_words(values: np.ndarray) -> np.ndarray:
    """Non-negative int64 (N,) as (N, 2) uint32, high word first: how 64-bit constants live in a 32-bit checkpoint."""
    return np.stack([values >> 32, values & 0xFFFFFFFF], axis=-1).astype(np.uint32)


@functools.lru_cache(maxsize=64)
def ngram_tables(layer_ids: tuple[int, ...], rows_per_head: tuple[int, ...], heads_per_order: int) -> dict[int, NgramTables]:
    """Tables of every Engram layer of a model. Sizes are primes, and no two tables share one.

    Args:
        layer_ids: in the order that hands out the primes.
        rows_per_head: base size for each order 2, 3, ...; every table holds at least that many rows, up to the gap
            to an unused prime.
    """
    used: set[int] = set()
    tables = {}
    for layer in layer_ids:
        orders = []
        for base in rows_per_head:
            heads, last = [], base - 1
            for _ in range(heads_per_order):
                last = _next_prime(last, used)
                used.add(last)
                heads.append(last)
            orders.append(tuple(heads))
        tables[layer] = NgramTables(tuple(orders))
    return tables


def ngram_rows(
    ids_BT: Any,
    segment_ids_BT: Any,
    words_N2: Any,
    tables: NgramTables,
    *,
    pad_id: Any,
    cross_document: bool = False,
) -> Any:
    """Rows of the flat table that each token's suffix n-grams hash to, (B, T, S) in (order, head) order.

    They are int32, or for a table of more rows two words, (int32 high, uint32 low).

    mix_n = (x_t m_0) ^ (x_{t-1} m_1) ^ ... ^ (x_{t-n+1} m_{n-1});  row = mix_n mod prime + offset.

    NumPy arrays are computed by NumPy, anything else by JAX. A negative id is no token: its own rows are -1.

    Args:
        ids_BT: compressed ids.
        segment_ids_BT: document index inside the row; 0 is padding, which is no token.
        words_N2: the layer's multipliers, split by `split_words`.
        pad_id: compressed id read where the n-gram has no token.
        cross_document: False is the rule of DeepSeek-V4.1: an n-gram ends at its document's start and at the nearest
            token to the left that is none. True reads on across documents, as the published demo does.
    """
    if isinstance(ids_BT, np.ndarray):
        return _rows(np, ids_BT, segment_ids_BT, words_N2, tables, pad_id, cross_document)
    with jax.enable_x64(True):
        return _rows(jnp, ids_BT, segment_ids_BT, words_N2, tables, pad_id, cross_document)


def _rows(xp, ids_BT, segment_ids_BT, words_N2, tables, pad_id, cross_document):
    words = words_N2.astype(xp.int64)
    multiplier_N = (words[:, 0] << 32) | words[:, 1]
    is_token = _is_token(ids_BT, segment_ids_BT)
    parts, mix = [], None
    slots = _slots(xp, ids_BT, segment_ids_BT, len(tables.primes), pad_id, cross_document)
    for shift, slot_BT in enumerate(slots):
        product = slot_BT.astype(xp.int64) * multiplier_N[shift]
        if mix is None:
            mix = product
            continue
        mix = mix ^ product
        # Nothing here is negative, so the plain remainder is the modulus.
        sizes = xp.asarray(np.array(tables.primes[shift - 1], np.int64))
        parts.append(xp.fmod(mix[..., None], sizes))
    rows = xp.concatenate(parts, axis=-1) + xp.asarray(np.array(tables.offsets, np.int64))
    rows = xp.where(is_token[..., None], rows, -1)
    if tables.num_rows < 2**31:
        return rows.astype(xp.int32)
    return (rows >> 32).astype(xp.int32), (rows & 0xFFFFFFFF).astype(xp.uint32)


def whole_ids(rows: Any) -> np.ndarray:
    """Rows as `ngram_rows` gives them for NumPy arrays, as one int64 each."""
    return (rows[0].astype(np.int64) << 32) | rows[1] if isinstance(rows, tuple) else rows.astype(np.int64)


def _is_token(ids_BT, segment_ids_BT):
    return (ids_BT >= 0) & (segment_ids_BT > 0)


def _slots(xp, ids_BT, segment_ids_BT, most, pad_id, cross_document):
    """The id that an n-gram reads 0, 1, ..., `most` places to the left, (B, T) each; `pad_id` where there is no token."""
    known = is_token = _is_token(ids_BT, segment_ids_BT)
    yield xp.where(is_token, ids_BT, 0)
    for shift in range(1, most + 1):
        before = _delayed(xp, ids_BT, shift)
        if cross_document:
            known = before >= 0
        else:
            same = _delayed(xp, segment_ids_BT, shift) == segment_ids_BT
            known = known & same & (before >= 0)
        yield xp.where(known, before, pad_id)


def _delayed(xp, values_BT, shift):
    """The values `shift` places to the left; -1 before the row's start."""
    length = values_BT.shape[1]
    front = xp.full((values_BT.shape[0], min(shift, length)), -1, values_BT.dtype)
    return xp.concatenate([front, values_BT[:, : max(length - shift, 0)]], axis=1)


def _next_prime(above: int, used: set[int]) -> int:
    candidate = above + 1
    while candidate in used or not _is_prime(candidate):
        candidate += 1
    return candidate


def _is_prime(n: int) -> bool:
    """Miller-Rabin; these bases decide every n < 3.3e24."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n < 2 or any(n % p == 0 for p in bases):
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(n, base, odd, twos) for base in bases)


def _passes(n: int, base: int, odd: int, twos: int) -> bool:
    value = pow(base, odd, n)
    if value in (1, n - 1):
        return True
    for _ in range(twos - 1):
        value = value * value % n
        if value == n - 1:
            return True
    return False
