"""One global stream on any number of hosts, also when their number changes on the way."""

import numpy as np
import pytest

from mlt.data.digest import batch_digest, join_digests, row_digests, step_digests
from mlt.data.loader import DataConfig, load_corpus, open_loader
from mlt.data.mixture import Mixture, Stage
from mlt.data.rows import TrainingRows

ROWS = 192  # a multiple of 64 and of 48
SOURCE = Mixture.example().replace(stages=(Stage(from_row=7 * ROWS + 5, weights=(1.0, 2.0)),))


def config(**settings):
    chosen = {"sequence_length": 24, "batch_size": ROWS, "validation_fraction": 0.1, "shuffle_block_rows": 64, **settings}
    return DataConfig(source=SOURCE, **chosen)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(config())


def read(loader, count):
    batches = [next(loader) for _ in range(count)]
    state = loader.state()
    loader.close()
    return batches, state


def joined(hosts):
    """Global batches from those of each host, in the order of the hosts."""
    return [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in zip(*hosts, strict=True)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_64_hosts_then_48_see_the_batches_of_one(corpus, packing):
    setting = config(packing=packing)
    whole, _ = read(open_loader(setting, corpus), 11)
    alone = setting.replace(prefetch_batches=0)
    before = [read(open_loader(alone, corpus, host_index=host, host_count=64), 5) for host in range(64)]
    assert all(state == before[0][1] for _, state in before)
    assert before[0][1]["rows"] == 5 * ROWS
    state = before[17][1]  # any host's will do
    after = [read(open_loader(alone, corpus, state=state, host_index=host, host_count=48), 6) for host in range(48)]
    assert all(batch["tokens"].shape == (4, 24) for batches, _ in after for batch in batches)
    assert_same(joined([batches for batches, _ in before]) + joined([batches for batches, _ in after]), whole)


def test_hosts_that_read_places_and_not_slices(corpus):
    """Places as a mesh deals them: interleaved, shared by two hosts, all on one."""
    whole, _ = read(open_loader(config(), corpus), 4)
    for places in (range(3, ROWS, 48), (191, 0, 5), range(ROWS)):
        state = open_loader(config(prefetch_batches=0), corpus, first_step=1).state()
        batches, _ = read(open_loader(config(), corpus, state=state, places=places), 3)
        assert_same(batches, [{name: values[list(places)] for name, values in batch.items()} for batch in whole[1:]])


def test_digests_are_the_same_on_any_host_count(corpus):
    expected = step_digests(config(), corpus, 5, 8)
    assert len(set(expected)) == 3
    for count in (1, 64, 48):
        sums = []
        for host in range(count):
            places = range(host * ROWS // count, (host + 1) * ROWS // count)
            loader = open_loader(config(prefetch_batches=0), corpus, first_step=5, places=places)
            sums.append([batch_digest(next(loader), places) for _ in range(3)])
        assert [join_digests(parts) for parts in zip(*sums, strict=True)] == expected


def test_digests_notice_every_field_every_place_and_nothing_else(corpus):
    rows = TrainingRows(config(), corpus)
    batch = rows.batch(range(6))
    digests = row_digests(batch)
    assert digests.dtype == np.uint64
    assert digests.shape == (6,)
    np.testing.assert_array_equal(digests, row_digests({name: values[:, :] for name, values in reversed(batch.items())}))
    np.testing.assert_array_equal(digests[2:4], row_digests(rows.batch([2, 3])))
    for name in batch:
        changed = {**batch, name: batch[name].copy()}
        changed[name][3, 23] += 1
        assert np.flatnonzero(row_digests(changed) != digests).tolist() == [3]
        wider = {**batch, name: batch[name].astype(np.float64)}
        assert (row_digests(wider) != digests).all()
    exchanged = {name: values[[1, 0, 2, 3, 4, 5]] for name, values in batch.items()}
    assert batch_digest(exchanged) != batch_digest(batch)
    swapped = {name: values.astype(values.dtype.newbyteorder(">")) for name, values in batch.items()}
    np.testing.assert_array_equal(row_digests(swapped), digests)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_row_names_the_documents_it_is_made_of(corpus, packing):
    rows = TrainingRows(config(packing=packing), corpus)
    for index in (0, 5, 300, 10**6):
        row, at = rows[index], 0
        for segment, (name, first, count) in enumerate(rows.documents(index), 1):
            _, seed, number = name.split("-")
            source = corpus.sources[int(seed) - 1]
            start = int(source.offsets_D[list(source.names).index(f"synthetic-{seed}-{number}")]) + first
            np.testing.assert_array_equal(row["tokens"][at : at + count], source.tokens[start : start + count])
            assert (row["segment_ids"][at : at + count] == segment).all()
            at += count
        assert at == int(row["weights"].sum())
