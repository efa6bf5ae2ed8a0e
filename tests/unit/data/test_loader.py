"""Loading: one stream of batches for any number of hosts, from any position, in any process."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mlt.config.problems import ConfigError
from mlt.data.huggingface import HuggingFaceTokenizer
from mlt.data.loader import DataConfig, TrainingRows, load_corpus, open_loader, validation_batches
from mlt.data.mixture import Mixture, Schedule
from mlt.data.synthetic import SyntheticText
from mlt.data.text_files import TextFiles
from mlt.errors import UserError

CONFIG = DataConfig(
    source=Mixture.example(),
    sequence_length=24,
    batch_size=12,
    validation_fraction=0.1,
    shuffle_block_rows=64,
)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(CONFIG)


def changed(**settings):
    return CONFIG.replace(**settings)


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def digest(batches):
    return hashlib.sha256(b"".join(batch[name].tobytes() for batch in batches for name in sorted(batch))).hexdigest()


@pytest.fixture(scope="module")
def stream(corpus):
    return take(open_loader(CONFIG, corpus), 20)


def test_batches_hold_the_rows_in_order(corpus, stream):
    rows = TrainingRows(CONFIG, corpus)
    for step, batch in enumerate(stream):
        assert set(batch) == {"tokens", "targets", "weights", "segment_ids", "positions"}
        for name, values in batch.items():
            assert values.shape == (12, 24)
            assert values.dtype == (np.float32 if name == "weights" else np.int32)
            np.testing.assert_array_equal(values, [rows[12 * step + place][name] for place in range(12)])


@pytest.mark.parametrize("host_count", [1, 2, 3, 4, 12])
def test_hosts_together_see_the_same_global_batches(corpus, stream, host_count):
    hosts = [take(open_loader(CONFIG, corpus, host_index=host, host_count=host_count), 20) for host in range(host_count)]
    joined = [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in zip(*hosts, strict=True)]
    assert_same(joined, stream)


@pytest.mark.parametrize("first_step", [1, 7, 19])
def test_start_at_any_step(corpus, stream, first_step):
    assert_same(take(open_loader(CONFIG, corpus, first_step=first_step), 20 - first_step), stream[first_step:])


@pytest.mark.parametrize("prefetch", [0, 1, 9])
def test_prefetching_changes_nothing_and_state_counts_what_was_handed_out(corpus, stream, prefetch):
    loader = open_loader(changed(prefetch_batches=prefetch), corpus)
    assert loader.state()["rows"] == 0
    first = [next(loader) for _ in range(6)]
    state = json.loads(json.dumps(loader.state()))
    loader.close()
    assert (state["rows"], state["tokens"]) == (72, 72 * 24)
    rest = [take(open_loader(CONFIG, corpus, state=state, host_index=host, host_count=2), 14) for host in (0, 1)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*rest, strict=True)]
    assert_same(first + joined, stream)


def test_another_process_sees_the_same_batches(stream):
    program = """
import hashlib, sys
from mlt.data.loader import DataConfig, load_corpus, open_loader
from mlt.data.mixture import Mixture
assert "jax" not in sys.modules and "grain" not in sys.modules, "importing the package must stay quick"
config = DataConfig(
    source=Mixture.example(), sequence_length=24, batch_size=12, validation_fraction=0.1, shuffle_block_rows=64
)
loader = open_loader(config, load_corpus(config), first_step=5)
digest = hashlib.sha256()
for _ in range(15):
    batch = next(loader)
    for name in sorted(batch):
        digest.update(batch[name].tobytes())
loader.close()
print(digest.hexdigest())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.split()[-1] == digest(stream[5:])


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "123"}


def test_stream_never_changes(stream):
    """Pinned: a different stream from the same config would break the resumption of every saved run."""
    assert digest(stream)[:16] == "eed244693af8d0e2"


def test_seed_changes_the_stream(corpus, stream):
    assert digest(take(open_loader(changed(seed=1), corpus), 20)) != digest(stream)


def test_mixture_shares_and_documents_never_mix(corpus):
    """Of the first 1000 rows, 750 and 250 come from the two sources, and each row from one source alone."""
    rows = TrainingRows(CONFIG, corpus)
    words = []
    for source in corpus.sources:
        starts, _ = source.split("train")
        words.append({bytes(source.tokens[start + 1 : start + 13].astype(np.uint8)) for start in starts})
    counts = [0, 0]
    schedule = Schedule([(0, (750, 250))], CONFIG.seed)
    for index in range(1000):
        source, _ = schedule.locate(index)
        counts[source] += 1
        row = rows[index]
        for start in np.flatnonzero((row["tokens"] == 256) & (row["positions"] == 0)):
            head = bytes(row["targets"][start : start + 12].astype(np.uint8))
            if len(head) == 12 and (row["segment_ids"][start : start + 12] == row["segment_ids"][start]).all():
                assert head in words[source]
    assert counts == [750, 250]


def test_every_training_token_comes_once_an_epoch():
    config = DataConfig(
        source=SyntheticText(num_documents=30),
        sequence_length=10,
        batch_size=5,
        shuffle_block_rows=1,
        validation_fraction=0.2,
    )
    corpus = load_corpus(config)
    (source,) = corpus.sources
    starts, targets = source.split("train")
    expected = np.concatenate(
        [source.tokens[start + 1 : start + 1 + count] for start, count in zip(starts, targets, strict=True)]
    )
    epoch = int(targets.sum())
    batches = take(open_loader(config, corpus), -(-2 * epoch // 50))
    line = np.concatenate([batch["targets"].ravel() for batch in batches])
    for number in range(2):
        here = line[number * epoch : (number + 1) * epoch]
        np.testing.assert_array_equal(np.bincount(here, minlength=272), np.bincount(expected, minlength=272))
        ends = np.flatnonzero(here == 257)
        assert len(ends) == len(starts)
        # Cut at the document ends, the epoch is the set of documents.
        documents = sorted(piece.tobytes() for piece in np.split(here, ends + 1))
        assert documents == sorted(
            [
                b"",
                *(source.tokens[s + 1 : s + 1 + n].astype(np.int32).tobytes() for s, n in zip(starts, targets, strict=True)),
            ]
        )


def test_wait_is_measured(corpus):
    loader = open_loader(CONFIG, corpus)
    assert loader.last_wait_seconds == 0
    next(loader)
    assert loader.last_wait_seconds > 0
    loader.close()


def test_another_batch_size_goes_on_at_the_same_row(corpus, stream):
    loader = open_loader(CONFIG, corpus)
    next(loader)
    state = loader.state()
    loader.close()
    rest = take(open_loader(changed(batch_size=6), corpus, state=state), 4)
    for name in ("tokens", "positions"):
        np.testing.assert_array_equal(
            np.concatenate([batch[name] for batch in rest]),
            np.concatenate([batch[name] for batch in stream[1:3]]),
        )


def test_another_sequence_length_goes_on_at_the_same_token(corpus):
    """Without row shuffling and mixing the targets are one line, however it is cut."""
    config = DataConfig(source=SyntheticText.example(), sequence_length=24, batch_size=2, shuffle_block_rows=1)
    corpus = load_corpus(config)
    whole = np.concatenate([batch["targets"].ravel() for batch in take(open_loader(config, corpus), 12)])
    loader = open_loader(config, corpus)
    for _ in range(4):
        next(loader)
    state = loader.state()
    loader.close()
    longer = config.replace(sequence_length=48)
    rest = np.concatenate([batch["targets"].ravel() for batch in take(open_loader(longer, corpus, state=state), 4)])
    np.testing.assert_array_equal(rest, whole[4 * 48 :])
    with pytest.raises(UserError, match="sequence_length=36 does not divide the saved position of 192 tokens"):
        open_loader(config.replace(sequence_length=36), corpus, state=state)


def test_hosts_that_do_not_divide_the_batch(corpus):
    for opening in (open_loader, validation_batches):
        with pytest.raises(UserError, match=r"batch_size=12 cannot be split over 5 hosts.*Nearest: 10 or 15"):
            opening(CONFIG, corpus, host_count=5)
        with pytest.raises(UserError, match=r"over 16 hosts.*Nearest: 16\."):
            opening(CONFIG, corpus, host_count=16)


def test_validation_sees_every_held_out_target_once(corpus):
    batches = validation_batches(CONFIG, corpus)
    assert len(batches) > 2
    seen = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    expected = []
    for source in corpus.sources:
        for start, count in zip(*source.split("validation"), strict=True):
            expected.append(source.tokens[start + 1 : start + 1 + count])
    np.testing.assert_array_equal(seen, np.concatenate(expected))
    for batch in batches:
        padding = batch["weights"] == 0
        assert (batch["segment_ids"][padding] == 0).all()
        assert (batch["tokens"][padding] == 258).all()
        assert (batch["segment_ids"][~padding] > 0).all()
        assert all(values.shape == (12, 24) for values in batch.values())
    assert batches[len(batches) - 1]["weights"].sum() < 12 * 24


def test_validation_over_hosts_and_part_of_it(corpus):
    whole = list(validation_batches(CONFIG, corpus))
    parts = [validation_batches(CONFIG, corpus, host_index=host, host_count=3) for host in range(3)]
    joined = [{name: np.concatenate([part[name] for part in hosts]) for name in hosts[0]} for hosts in zip(*parts, strict=True)]
    assert_same(joined, whole)
    rows = np.concatenate([batch["targets"] for batch in whole]).tolist()
    some = validation_batches(CONFIG, corpus, max_rows=7)
    assert len(some) == 1
    chosen = some[0]["targets"][:7].tolist()
    places = [rows.index(row) for row in chosen]
    assert places == sorted(set(places))
    assert places[-1] > len(rows) // 2  # spread over all of it, not its beginning
    assert (some[0]["weights"][7:] == 0).all()
    assert len(validation_batches(CONFIG, corpus, max_rows=10**6)) == len(whole)


def test_no_validation_if_none_is_wanted():
    config = changed(validation_fraction=0.0)
    assert list(validation_batches(config, load_corpus(config))) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"sequence_length": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
        {"shuffle_block_rows": 0},
        {"prefetch_batches": -1},
        {"source": "text"},
        {"sequence_lenght": 8},
    ],
)
def test_config_refuses_impossible_values(settings):
    with pytest.raises(ConfigError):
        DataConfig(**{"sequence_length": 8, "batch_size": 2, **settings})


def test_config_reads_nothing_until_asked():
    config = DataConfig(
        source=TextFiles(paths=("not/there",)),
        tokenizer=HuggingFaceTokenizer(path="not/there.json"),
        sequence_length=8,
        batch_size=2,
    )
    with pytest.raises(UserError):
        config.check_files()
