"""Parameters, FLOPs, bytes and decoding state of a model, from its description alone."""

import dataclasses

import jax
import jax.numpy as jnp

from mlt.model.lm import LM, LMConfig
from mlt.model.streams import stream_flops
from mlt.nn.param import ParamSpec, named_leaves


@dataclasses.dataclass(frozen=True)
class Count:
    """Attributes:
    params: trained values, tables included.
    table_params: of which in sparse tables (memory values, Engram rows).
    active_params: trained values that one token's forward pass touches.
    flops_per_token: forward FLOPs per token, averaged over a sequence of the given length.
    state_values: values kept per sequence while decoding after that many tokens.
    """

    params: int
    table_params: int
    active_params: int
    flops_per_token: float
    state_values: int


def count(config: LMConfig, model: LM, seq_len: int) -> Count:
    """Add up what the described parameters and the mixers say.

    Args:
        config: the model's config.
        model: its described tree (`config.build(...)`).
        seq_len: tokens per sequence.
    """
    specs = [spec for _, spec in named_leaves(model) if spec.trainable]
    params = sum(spec.size for spec in specs)
    tables = sum(spec.size for spec in specs if spec.group == "table")
    mixers = config.stack.mixers()
    flops = sum(mixer.flops_per_token(config.d_model, seq_len) for mixer in mixers)
    flops += 2 * config.d_model * config.vocab_size + stream_flops(config.stack, config.d_model)
    inactive = sum(mixer.inactive_params(config.d_model) for mixer in mixers)
    # Of a table that layers share, each takes off what it reads.
    inactive += sum(spec.size for _, spec in named_leaves(model.stack.shared) if spec.group == "table")
    state = sum(mixer.state_size(config.d_model, seq_len) for mixer in mixers)
    return Count(params, tables, params - inactive, flops, state)


def decoding_bytes(model: LM, seq_len: int, dtype: str = "bfloat16") -> int:
    """Bytes of everything that decoding keeps for one sequence of up to `seq_len` tokens, with a stream of this type.

    Args:
        model: the described tree.
    """
    abstract = jax.tree.map(lambda spec: spec.abstract(), model)
    state = jax.eval_shape(lambda model: model.init_state(1, seq_len, jnp.dtype(dtype)), abstract)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def parameter_table(model: LM) -> list[tuple[str, str, str, str, str]]:
    """Rows (name, shape, axes, init, group) for every described parameter, in tree order."""
    return [(name, *_columns(spec)) for name, spec in named_leaves(model)]


def _columns(spec: ParamSpec) -> tuple[str, str, str, str]:
    shape = "x".join(map(str, spec.shape))
    axes = ",".join(axis or "-" for axis in spec.axes)
    group = spec.group if spec.trainable else "buffer"
    return shape, axes, f"{spec.init.text} {spec.dtype}", group
