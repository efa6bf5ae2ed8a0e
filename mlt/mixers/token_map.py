"""Which tokens count as one where Engram hashes them: those whose texts are alike (arXiv 2601.07372)."""

import functools

import numpy as np

from mlt.errors import UserError
from mlt.mixers.base import BuildInfo
from mlt.nn.ngram_hash import compression_map
from mlt.nn.param import Buffer, buffer, given


def token_map(info: BuildInfo, pad_token_id: int, *, compress: bool) -> np.ndarray | None:
    """Compressed id of every row of the vocabulary, int32 (V,); those that no token has stand for the pad token.

    Args:
        compress: False gives None: every token counts as itself.

    Raises:
        UserError: the tokenizer does not fit the compression or the vocabulary.
    """
    if pad_token_id >= info.vocab_size:
        raise UserError(f"Engram: pad_token_id = {pad_token_id} must be below the vocabulary size, {info.vocab_size}")
    if not compress:
        return None
    if info.token_strings is None:
        raise UserError(
            "Engram: compress_tokens = True needs the text of every token, and this model has no tokenizer; "
            "name a tokenizer in the data section, or use compress_tokens = False"
        )
    known = len(info.token_strings)
    if not pad_token_id < known <= info.vocab_size:
        raise UserError(
            f"Engram: the tokenizer has {known} tokens; it must have more than pad_token_id = {pad_token_id} "
            f"and at most as many as the vocabulary size, {info.vocab_size}"
        )
    token_map_V = _compression(info.token_strings)
    unused = np.full(info.vocab_size - known, token_map_V[pad_token_id], np.int32)
    return np.concatenate([token_map_V, unused])


def map_buffer(token_map_V: np.ndarray) -> Buffer:
    """The map as a part of the model that nothing trains."""
    text = f"compression of {token_map_V.size} tokens to {int(token_map_V.max()) + 1}"
    return buffer(token_map_V.shape, (None,), given(token_map_V, text), dtype="int32")


@functools.lru_cache(maxsize=4)
def _compression(token_strings: tuple[str, ...]) -> np.ndarray:
    return compression_map(token_strings)
