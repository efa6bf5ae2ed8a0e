"""Engram: token compression, exact hashes, gate, decoding, packed documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlt_kernels.testing import assert_close, assert_same_bits, check_isolation, positions, segment_ids

from mlt.errors import UserError
from mlt.mixers.base import BuildInfo, Context
from mlt.mixers.channel.engram import Engram
from mlt.nn.ngram_hash import compression_map, multipliers, ngram_rows, ngram_tables, normalized, split_words
from mlt.nn.param import initialize, partition
from mlt.parallel.rules import Rules

D = 16
INFO = BuildInfo(d_model=D, num_sub_layers=4, vocab_size=1000)
CONFIG = Engram(
    layer_id=4, layer_ids=(1, 4), rows_per_head=40, head_dim=6, heads_per_order=2, compress_tokens=False, pad_token_id=2
)
NO_CONV = CONFIG.model_copy(update={"conv": False, "max_ngram": 4})
CROSSING = CONFIG.model_copy(update={"cross_document": True})

GOLDEN_IDS = np.array([[5, 17, 5, 17, 999, 0, 123]], np.int32)
GOLDEN_TABLES = {1: ((1009, 1013), (1019, 1021)), 4: ((1031, 1033), (1039, 1049))}
GOLDEN_MULTIPLIERS = {
    1: [7593627661414631, 479593001838623, 3563315849468963],
    4: [8151329585359679, 499204887149849, 7298468104530077],
}
GOLDEN_ROWS = {
    1: "258,985,312,20 977,261,823,606 216,248,242,731 977,261,914,827 404,143,926,384 315,920,717,740 305,417,729,127",
    4: "766,485,743,11 915,875,788,939 653,577,466,263 915,875,427,847 37,512,803,498 757,583,216,456 874,130,254,367",
}

run = jax.jit(lambda mixer, x, ctx: mixer(x, ctx)[0])
step = jax.jit(lambda mixer, x, state, ctx: mixer.step(x, state, ctx))


def lively(config, info=INFO):
    """A mixer whose norms and convolution are away from their initial values."""
    mixer = initialize(config.build(info), 0)
    rng = np.random.default_rng(1)
    trained, buffers = partition(mixer)
    trained = jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape).astype(np.float32), trained)
    return jax.tree.map(lambda a, b: b if a is None else a, trained, buffers, is_leaf=lambda leaf: leaf is None)


def inputs(config=CONFIG, batch=2, length=40, seed=0, padding=True, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    segments = segment_ids(seed, batch, length, padding=padding)
    x = rng.standard_normal((batch, length, D)).astype(np.float32)
    # Few different tokens, so that n-grams recur.
    ids = rng.choice([5, 17, 999, 0, 123], (batch, length)).astype(np.int32)
    return jnp.asarray(x, dtype), context(ids, segments)


def context(ids, segments):
    segments = np.asarray(segments, np.int32)
    return Context(jnp.asarray(ids), jnp.asarray(segments), jnp.asarray(positions(segments)), Rules(), True)


def plain_rows(ids, segments, multiplier, primes, pad, cross_document):
    """One n-gram at a time, in Python integers."""
    rows = []
    for t in range(len(ids)):
        gram, known = [], True
        for k in range(len(multiplier)):
            exists = t - k >= 0 and ids[t - k] >= 0
            known = exists and (cross_document or (known and segments[t - k] == segments[t]))
            gram.append(int(ids[t - k]) if known else pad)
        start, row = 0, []
        for order, sizes in enumerate(primes, start=2):
            mix = 0
            for k in range(order):
                mix ^= gram[k] * int(multiplier[k])
            for size in sizes:
                row.append(start + mix % size)
                start += size
        rows.append(row if ids[t] >= 0 and segments[t] > 0 else [-1] * len(row))
    return rows


@pytest.mark.parametrize("layer", [1, 4])
def test_golden_hashes(layer):
    tables = ngram_tables((1, 4), (1000, 1000), 2)[layer]
    assert tables.primes == GOLDEN_TABLES[layer]
    sizes = [size for order in GOLDEN_TABLES[layer] for size in order]
    assert tables.offsets == tuple(sum(sizes[:i]) for i in range(4))
    multiplier = multipliers(1000, 3, layer)
    np.testing.assert_array_equal(multiplier, GOLDEN_MULTIPLIERS[layer])
    words, ones = split_words(multiplier), np.ones_like(GOLDEN_IDS)
    expected = np.array([[int(row) for row in token.split(",")] for token in GOLDEN_ROWS[layer].split()]) + tables.offsets
    for hashed in (
        ngram_rows(GOLDEN_IDS, ones, words, tables, pad_id=2),
        jax.jit(lambda ids: ngram_rows(ids, jnp.asarray(ones), jnp.asarray(words), tables, pad_id=2))(GOLDEN_IDS),
    ):
        assert hashed.dtype == np.int32
        np.testing.assert_array_equal(hashed[0], expected)


@pytest.mark.parametrize(
    ("layers", "base", "orders", "totals"),
    [
        ((1, 14), 16_000_000, 3, (384_006_168, 384_016_682)),
        ((1, 15), 2_262_400, 2, (36_199_972, 36_204_260)),
        ((1, 15), 7_239_680, 2, (115_837_464, 115_841_428)),
    ],
)
def test_published_row_counts(layers, base, orders, totals):
    tables = ngram_tables(layers, (base,) * orders, 8)
    assert tuple(tables[layer].num_rows for layer in layers) == totals
    sizes = [size for table in tables.values() for size in table.sizes]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize(
    ("make", "rows", "d_memory", "conv"),
    [
        (Engram.as_in_paper, (36_199_972, 36_204_260), 1280, True),
        (functools.partial(Engram.as_in_paper, rows_per_head=7_239_680), (115_837_464, 115_841_428), 1280, True),
        (Engram.as_in_v4_1, (384_006_168, 384_016_682), 6144, False),
    ],
)
def test_published_settings_have_the_published_sizes(make, rows, d_memory, conv):
    layers = [make(number, (1, 14)) for number in (1, 14)]
    assert tuple(layer.tables.num_rows for layer in layers) == rows
    for layer in layers:
        assert not list(layer.problems())
        assert (layer.d_memory, layer.conv) == (d_memory, conv)
        module = layer.build(BuildInfo(64, 2, 300, tuple(map(str, range(300)))))
        assert (module.conv is not None) == conv


@pytest.mark.parametrize("cross_document", [False, True])
def test_hashes_equal_python_integers(cross_document):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 99_092, (3, 50)).astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    segments = segment_ids(1, 3, 50)
    tables = ngram_tables((0, 3), (97, 50, 1000), 3)[3]
    multiplier = multipliers(99_092, 4, 3, seed=5)
    assert (multiplier % 2 == 1).all()
    assert all(int(m) * 99_091 < 2**63 for m in multiplier)
    expected = [plain_rows(*row, multiplier, tables.primes, 7, cross_document) for row in zip(ids, segments, strict=True)]
    words = split_words(multiplier)
    np.testing.assert_array_equal(ngram_rows(ids, segments, words, tables, pad_id=7, cross_document=cross_document), expected)
    hashed = jax.jit(lambda *arrays: ngram_rows(*arrays, tables, pad_id=7, cross_document=cross_document))
    np.testing.assert_array_equal(hashed(ids, segments, words), expected)


def test_a_token_changes_only_the_n_grams_it_is_in():
    ids, ones = np.arange(30, dtype=np.int32)[None], np.ones((1, 30), np.int32)
    tables, words = ngram_tables((1,), (10_000_000,) * 3, 4)[1], split_words(multipliers(1000, 4, 1))
    before = ngram_rows(ids, ones, words, tables, pad_id=0)
    ids[0, 12] = 500
    changed = ngram_rows(ids, ones, words, tables, pad_id=0) != before
    assert np.flatnonzero(changed[0].any(-1)).tolist() == [12, 13, 14, 15]
    # Heads of order n see the change up to n - 1 tokens later.
    assert [np.flatnonzero(changed[0, :, 4 * order]).max() for order in range(3)] == [13, 14, 15]


def test_a_packed_document_hashes_as_it_does_alone():
    ids, segments = np.random.default_rng(0).integers(0, 1000, (1, 60)).astype(np.int32), segment_ids(3, 1, 60)
    tables, words = ngram_tables((1,), (500, 500), 2)[1], split_words(multipliers(1000, 3, 1))
    rows = ngram_rows(ids, segments, words, tables, pad_id=2)
    for document in range(1, segments.max() + 1):
        inside = segments[0] == document
        alone = ngram_rows(ids[:, inside], np.ones((1, inside.sum()), np.int32), words, tables, pad_id=2)
        np.testing.assert_array_equal(rows[0, inside], alone[0])


def test_compression_shares_ids_of_like_tokens():
    groups = [
        ["Apple", " apple", "\u00c4pple", "APPLE "],
        ["pear"],
        [" ", "\n", "\t \r"],
        [""],
        ["\u0301"],
        ["\ufffd"],
        ["a\ufffd"],
        ["\ufb01", "fi"],
        ["\u2460", "1"],
    ]
    compressed = compression_map([text for group in groups for text in group])
    assert compressed.tolist() == [number for number, group in enumerate(groups) for _ in group]
    assert compression_map(["\ufffd", "\ufffd"]).tolist() == [0, 1]
    # Spellings of partial characters are keys like any other.
    assert compression_map(["\ufffd", "x", "\ufffd"], ["\u0142", "x", "x"]).tolist() == [0, 1, 1]


def test_normalization_is_that_of_the_tokenizers_library():
    tokenizers = pytest.importorskip("tokenizers")
    parts = tokenizers.normalizers
    space = parts.Replace(tokenizers.Regex(r"[ \t\r\n]+"), " ")
    lone = parts.Replace(tokenizers.Regex("^ $"), "\ue000")
    strip = [parts.NFKC(), parts.NFD(), parts.StripAccents(), parts.Lowercase(), space, lone, parts.Strip()]
    theirs = parts.Sequence([*strip, parts.Replace("\ue000", " ")])
    # Letters and marks that old and new editions of Unicode agree on, white space of every kind, and the sigma.
    alphabet = [chr(c) for c in (*range(0x20, 0x250), *range(0x300, 0x500), *range(0x2000, 0x2070), *range(0xFB00, 0xFB07))]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice([*alphabet, " ", "\n", "\t", "\x1c", "\u03a3"], 6)) for _ in range(3000)]
    for text in [*alphabet, *texts, " ", " \n ", "\u039f\u03a3", ""]:
        assert normalized(text) == theirs.normalize_str(text), ascii(text)


def plain(mixer, x, ctx):
    """The equations, with rows gathered by index and a convolution written as a sum over taps."""
    config, rms = mixer.config, lambda a, eps: a / jnp.sqrt((a**2).mean(-1, keepdims=True) + eps)
    ids, segments = np.asarray(ctx.token_ids), np.asarray(ctx.segment_ids)
    multiplier = multipliers(INFO.vocab_size, config.max_ngram, config.layer_id)
    primes, pad, cross = config.tables.primes, config.pad_token_id, config.cross_document
    rows = np.array([plain_rows(*row, multiplier, primes, pad, cross) for row in zip(ids, segments, strict=True)])
    e = jnp.where((rows >= 0)[..., None], mixer.table[...][np.maximum(rows, 0)], 0.0)
    key, value = (jnp.einsum("btsh,shd->btd", e, linear.kernel[...]) for linear in (mixer.key, mixer.value))
    query, key = rms(x, 1e-6) * mixer.query_norm.scale[...], rms(key, 1e-6) * mixer.key_norm.scale[...]
    score = (query * key).sum(-1, keepdims=True) / D**0.5
    score = jnp.where(
        jnp.abs(score) > 1e-6, jnp.sign(score) * jnp.sqrt(jnp.maximum(jnp.abs(score), 1e-6)), jnp.sign(score) * 1e-3
    )
    u = jax.nn.sigmoid(score) * value
    if not config.conv:
        return u
    normed, kernel = rms(u, 1e-5) * mixer.conv_norm.scale[...], mixer.conv.kernel[...]
    mixed = jnp.zeros_like(u)
    for tap in range(4):
        source = np.arange(u.shape[1]) - (3 - tap) * config.max_ngram
        same = (source >= 0) & (cross | (segments[:, source] == segments))
        mixed = mixed + jnp.where(same[..., None], kernel[tap] * normed[:, source], 0.0)
    return jax.nn.silu(mixed) + u


@pytest.mark.parametrize("config", [CONFIG, NO_CONV, CROSSING], ids=["conv", "no_conv", "crossing"])
def test_values_and_gradients_match_the_equations(config):
    mixer = lively(config)
    x, ctx = inputs(length=17)
    is_token = np.asarray(ctx.is_token)
    trained, buffers = partition(mixer)

    def total(trained, x, apply):
        whole = jax.tree.map(lambda a, b: b if a is None else a, trained, buffers, is_leaf=lambda leaf: leaf is None)
        y = jnp.where(is_token[..., None], apply(whole, x, ctx), 0.0)
        return (y**2).sum(), y

    gradients = jax.jit(jax.grad(total, (0, 1), has_aux=True), static_argnums=2)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (trained, x))
        grads, y = jax.tree.map(np.asarray, gradients(*exact, plain))
    got_grads, got_y = gradients(trained, x, lambda mixer, x, ctx: mixer(x, ctx)[0])
    assert_close(got_y, y, max_rel=2e-6)
    for (path, want), got in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(got_grads), strict=True):
        assert np.abs(want).max() > 0, path
        assert_close(got, want, max_rel=1e-5, what=jax.tree_util.keystr(path))
    unread = ~np.asarray(grads[0].table[...]).any(-1)
    assert unread[config.tables.num_rows :].all()
    np.testing.assert_array_equal(np.asarray(got_grads[0].table[...])[unread], 0.0)


def test_a_fresh_module_is_the_gated_value_alone():
    with_conv = initialize(CONFIG.build(INFO), 0)
    without = initialize(CONFIG.model_copy(update={"conv": False}).build(INFO), 0)
    x, ctx = inputs()
    assert_same_bits(run(with_conv, x, ctx), run(without, x, ctx))


@pytest.mark.parametrize("config", [CONFIG, NO_CONV, CROSSING], ids=["conv", "no_conv", "crossing"])
def test_decoding_in_chunks_equals_the_full_pass(config):
    mixer = lively(config)
    x, ctx = inputs(padding=False, seed=4)
    assert ctx.segment_ids.max() > 3
    full = run(mixer, x, ctx)
    for sizes in ([1] * 40, [13, 1, 1, 13, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]):
        state, at, parts = mixer.init_state(2, 40, jnp.float32), 0, []
        for size in sizes:
            part = jax.tree.map(lambda a: a[:, at : at + size], ctx)  # noqa: B023
            y, state = step(mixer, x[:, at : at + size], state, part)
            parts.append(y)
            at += size
        assert at == 40
        assert_close(jnp.concatenate(parts, axis=1), full, max_rel=1e-6)
    kept = sum(leaf[0].size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert config.state_size(D, 40) == kept


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_documents_are_isolated_to_the_bit(dtype):
    mixer = lively(CONFIG)
    x, ctx = inputs(seed=3, dtype=dtype)
    check_isolation(lambda x: mixer(x, ctx)[0], {"x": x}, np.asarray(ctx.segment_ids), token_arguments=("x",))


def test_another_document_s_token_ids_change_no_bit_unless_asked_to():
    x, ctx = inputs(seed=3)
    inside = np.asarray(ctx.segment_ids) == 2
    ids = np.where(inside, 700, np.asarray(ctx.token_ids)).astype(np.int32)
    others, other = ~inside & (np.asarray(ctx.segment_ids) > 0), context(ids, ctx.segment_ids)
    before, after = (np.asarray(run(lively(CONFIG), x, c)) for c in (ctx, other))
    assert_same_bits(after[others], before[others])
    assert (after[inside] != before[inside]).any()
    before, after = (np.asarray(run(lively(CROSSING), x, c)) for c in (ctx, other))
    assert (after[others] != before[others]).any()


def test_outputs_depend_on_the_declared_left_context_and_no_more():
    mixer = lively(CONFIG)
    x, _ = inputs()
    ids, ones = np.random.default_rng(0).integers(0, 1000, (1, 40)).astype(np.int32), np.ones((1, 40))
    before = run(mixer, x[:1], context(ids, ones))
    ids[0, 10] = 1 + ids[0, 10] % 900
    moved = np.asarray(run(mixer, x[:1], context(ids, ones)) != before).any(-1)[0]
    assert not moved[:10].any()
    assert moved[10]
    assert CONFIG.left_context == 11
    assert np.flatnonzero(moved).max() == 10 + CONFIG.left_context


def test_negative_ids_read_nothing():
    mixer = lively(NO_CONV)
    x, ctx = inputs(padding=False)
    ids = np.asarray(ctx.token_ids).copy()
    ids[:, ::7] = -3
    y = np.asarray(run(mixer, x, context(ids, ctx.segment_ids)))
    assert not y[:, ::7].any()
    assert y[:, 1::7].any(-1).all()


def test_compressed_tokens_and_multipliers_come_from_the_buffers():
    words = tuple(space + word for word in "aAbBcC" for space in ("", " ", "\n"))
    info = BuildInfo(d_model=D, num_sub_layers=4, vocab_size=20, token_strings=words)
    config = CONFIG.model_copy(update={"compress_tokens": True, "pad_token_id": 1})
    mixer = initialize(config.build(info), 0)
    np.testing.assert_array_equal(mixer.token_map[...], [0] * 6 + [1] * 6 + [2] * 6 + [0] * 2)
    assert mixer.token_map.dtype == jnp.int32
    high, low = np.asarray(mixer.multipliers[...]).astype(object).T
    np.testing.assert_array_equal(high * 2**32 + low, multipliers(3, 3, 4))
    x, ctx = inputs(length=6, padding=False)
    lower = context(np.tile([0, 6, 12, 0, 6, 12], (2, 1)).astype(np.int32), ctx.segment_ids)
    upper = context(np.tile([3, 10, 17, 4, 11, 15], (2, 1)).astype(np.int32), ctx.segment_ids)
    assert_same_bits(run(mixer, x, upper), run(mixer, x, lower))


def test_bfloat16_stays_near_float32():
    mixer = lively(CONFIG)
    x, ctx = inputs(dtype=jnp.bfloat16)
    y, exact = run(mixer, x, ctx), run(mixer, x.astype(jnp.float32), ctx)
    assert y.dtype == jnp.bfloat16
    assert_close(y, exact, max_rel=2e-2)


def test_no_tokens_and_padding_alone():
    mixer = lively(CONFIG)
    x, ctx = inputs()
    none = jax.tree.map(lambda a: a[:, :0], ctx)
    assert run(lively(NO_CONV), x[:, :0], none).shape == (2, 0, D)
    only_padding = context(ctx.token_ids, np.zeros((2, 40)))
    assert not np.asarray(run(mixer, x, only_padding)).any()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_hashes_lower_for_accelerators_inside_remat_and_scan(platform):
    tables, words = ngram_tables((1,), (500, 500), 2)[1], split_words(multipliers(1000, 3, 1))
    ids = np.zeros((1, 8), np.int32)

    def total(table):
        @jax.checkpoint
        def layer(h, _):
            rows = ngram_rows(jnp.asarray(ids), jnp.ones((1, 8), jnp.int32), jnp.asarray(words), tables, pad_id=2)
            return h + table[rows].sum() * h, None

        return jax.lax.scan(layer, 1.0, None, length=2)[0]

    table = jnp.ones(tables.num_rows)
    text = jax.jit(jax.grad(total)).trace(table).lower(lowering_platforms=(platform,)).as_text()
    assert "i64" in text
    assert "f64" not in text


def test_user_errors():
    compressing = CONFIG.model_copy(update={"compress_tokens": True})
    with pytest.raises(UserError, match="no tokenizer"):
        compressing.build(INFO)
    with pytest.raises(UserError, match=r"pad_token_id = 2 .* vocabulary size, 2"):
        CONFIG.build(BuildInfo(d_model=D, num_sub_layers=4, vocab_size=2))
    with pytest.raises(UserError, match="5 tokens"):
        compressing.build(BuildInfo(d_model=D, num_sub_layers=4, vocab_size=4, token_strings=tuple("abcde")))


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"head_dim": 0}, "head_dim"),
        ({"max_ngram": 1}, "max_ngram"),
        ({"seed": -1}, "seed"),
        ({"layer_ids": (1, 1)}, "layer_ids"),
        ({"layer_id": 2}, "layer_id"),
        ({"rows_per_head": 2**62}, "rows_per_head"),
        ({"rows_per_head": 2**60}, "rows_per_head"),
        ({"table_on": "host"}, "table_on"),
    ],
)
def test_problems(fields, path):
    assert [problem.path for problem in CONFIG.model_copy(update=fields).problems()] == [path]


def test_good_configs_have_no_problems():
    assert not [problem for config in (CONFIG, NO_CONV, CROSSING) for problem in config.problems()]
