"""A checkpoint whose tokens were compressed otherwise is refused before anything of it is read."""

import dataclasses

import jax
import pytest

from mlt.checkpoint.save import Checkpointer
from mlt.data.tokenize import ByteTokenizer
from mlt.errors import UserError
from mlt.mixers.base import BuildInfo
from mlt.mixers.channel.engram import Engram
from mlt.nn.param import initialize, stack_specs
from mlt.train.token_maps import check_token_maps

STRINGS = ByteTokenizer().token_strings()
LAYER = Engram(layer_id=0, layer_ids=(0,), rows_per_head=20, head_dim=2, heads_per_order=1, conv=False)


def model(strings: tuple[str, ...]) -> dict:
    mixer = LAYER.build(BuildInfo(4, 1, 272, strings))
    return {"head": mixer, "period": stack_specs(LAYER.build(BuildInfo(4, 1, 272, strings)), 2)}


def test_another_compression_is_refused_before_it_is_read(tmp_path, monkeypatch):
    check = lambda strings, **options: check_token_maps(tmp_path, model(strings), ByteTokenizer(), **options)  # noqa: E731
    check(STRINGS)  # no checkpoint, nothing to compare
    state = {"model": jax.tree.map(jax.numpy.asarray, initialize(model(STRINGS), 0))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, data={}, meta={})
    monkeypatch.setattr("mlt.checkpoint.arrays.StoredArrays.read", None)
    check(STRINGS)
    check(STRINGS, step=7)  # not there: the restore says so
    # The bytes of `a` and `A` no longer share an id.
    changed = tuple(text if text != "a" else "another" for text in STRINGS)
    with pytest.raises(UserError, match=r"step 3 .* ByteTokenizer gives now \(head.token_map, 272 tokens\)"):
        check(changed, step=3)


def test_layers_without_a_map_are_left_alone(tmp_path):
    plain = dataclasses.replace(BuildInfo(4, 1, 272), token_strings=None)
    check_token_maps(tmp_path, LAYER.replace(compress_tokens=False).build(plain), ByteTokenizer())
