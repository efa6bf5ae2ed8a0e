"""What layers have in common that attend to keys and values of an earlier layer: what they name, and what must divide what.

Not in a folder of mixers, which the conformance suite tests one by one: `CrossAttention` and `DifferentialCrossAttention` are.
"""

from collections.abc import Iterator
from typing import ClassVar

from mlt.config.problems import Problem
from mlt.mixers.base import SequenceMixerConfig
from mlt.mixers.sizes import not_divisor, not_positive


class PublishedKeys(SequenceMixerConfig):
    """Queries of this layer meet keys and values that another one published.

    While decoding, the layer reads its publisher's cache, which has the new tokens already, and keeps nothing itself.

    Attributes:
        source: name under which the keys and values were published.
        num_heads: query heads (N).
        head_dim: width of a query or key (H).
        num_kv_heads: published key heads (K), a divisor of num_heads; None means num_heads.
        rope_base: base of the rotary embedding of the queries, the publisher's; None leaves positions out.
    """

    context: ClassVar[str] = "ring"
    op: ClassVar[str] = "attention"

    source: str
    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    rope_base: float | None = 10_000.0

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def problems(self) -> Iterator[Problem]:
        sizes = list(not_positive(self, "num_heads", "head_dim", "num_kv_heads"))
        yield from sizes or not_divisor(self, "num_kv_heads", "num_heads")

    def state_size(self, d_model: int, seq_len: int) -> int:
        return 0
