"""A process loads the rows that its devices hold, whatever the layout."""

import numpy as np
import pytest

from mlt.data.loader import DataConfig, load_corpus, open_loader, validation_batches
from mlt.data.synthetic import SyntheticText
from mlt.parallel.mesh import Layout
from mlt.train.feed import Feed

CONFIG = DataConfig(source=SyntheticText(num_documents=40), sequence_length=16, batch_size=8)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"replica": 2, "context": 4}])
def test_the_batch_on_the_devices_is_the_batch(sizes):
    feed = Feed(Layout(**sizes).rules(), 8, 16)
    assert feed.places == tuple(range(8))
    batch = next(open_loader(CONFIG, load_corpus(CONFIG), places=feed.places))
    for name, array in feed(batch).items():
        assert array.sharding.is_equivalent_to(feed.sharding, 2)
        np.testing.assert_array_equal(array, batch[name])


@pytest.mark.parametrize("shares", [[(0, 1, 2, 3), (4, 5, 6, 7)], [(0, 2, 5), (1, 3, 4), (6, 7)], [(0, 1), (0, 1)]])
def test_places_are_rows_of_the_one_global_batch(shares):
    corpus = load_corpus(CONFIG)
    whole = open_loader(CONFIG, corpus, first_step=3)
    parts = [open_loader(CONFIG, corpus, first_step=3, places=places) for places in shares]
    for _ in range(3):
        expected = next(whole)
        for places, part in zip(shares, parts, strict=True):
            for name, array in next(part).items():
                np.testing.assert_array_equal(array, expected[name][list(places)])
    assert all(part.state() == whole.state() for part in parts)
    held_out = validation_batches(CONFIG, corpus)
    for places in shares:
        for found, expected in zip(validation_batches(CONFIG, corpus, places=places), held_out, strict=True):
            np.testing.assert_array_equal(found["tokens"], expected["tokens"][list(places)])
