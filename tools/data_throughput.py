"""Rows and tokens a second of the loader, beside plain Grain pipelines over the same tokens, and what packing pads and cuts.

    python tools/data_throughput.py [--length 4096] [--batch 8] [--batches 200] [--rounds 7]

Everything reads the standard library's own sources as bytes, in one process. Each round times every pipeline in turn over the
same number of batches, after some untimed ones that use up what was made ahead; the figures are medians over the rounds. Grain:
documents shuffled and repeated, packed by Grain's own packing, batched; once with the two features that a batch here has
(`tokens` and `targets`), once with `tokens` alone, which is the least that a pipeline can do.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from mlt.data.loader import Corpus, DataConfig, load_corpus, open_loader
from mlt.data.rows import TrainingRows
from mlt.data.stdlib_source import PythonStdlib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="tokens a row")
    parser.add_argument("--batch", type=int, default=8, help="rows a batch")
    parser.add_argument("--batches", type=int, default=200, help="timed batches of each pipeline and round")
    parser.add_argument("--rounds", type=int, default=7)
    words = parser.parse_args()
    config = DataConfig(source=PythonStdlib(), sequence_length=words.length, batch_size=words.batch)
    corpus = load_corpus(config)
    print(corpus.describe())
    packing_table(config, corpus)
    pipelines: dict[str, Iterator[Any]] = {}
    for packing in ("concatenate", "best_fit"):
        pipelines[f"{packing}, this loader"] = open_loader(config.replace(packing=packing), corpus)
        for features in (("tokens", "targets"), ("tokens",)):
            pipelines[f"{packing}, Grain, {' and '.join(features)}"] = grain_batches(config, corpus, packing, features)
    seconds = measure(pipelines, words.batches, words.rounds)
    print(f"\n{'rows of ' + str(words.length) + ' tokens':40} {'rows/s':>10} {'tokens/s':>14} {'this loader is':>16}")
    for name, times in seconds.items():
        ours = seconds[f"{name.split(',')[0]}, this loader"]
        faster = statistics.median(theirs / mine for theirs, mine in zip(times, ours, strict=True))
        rows = words.batch * words.batches / statistics.median(times)
        print(f"{name:40} {rows:10,.0f} {rows * words.length:14,.0f} {'' if times is ours else f'{faster:13.1f} x':>16}")


def measure(pipelines: dict[str, Iterator[Any]], batches: int, rounds: int) -> dict[str, list[float]]:
    """Seconds that `batches` batches took, of each pipeline in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(rounds + 1):
        for name, pipeline in pipelines.items():
            for _ in range(max(1, batches // 4)):
                next(pipeline)
            started = time.perf_counter()
            for _ in range(batches):
                next(pipeline)
            seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}


def grain_batches(config: DataConfig, corpus: Corpus, packing: str, features: tuple[str, ...]) -> Iterator[Any]:
    """Batches of a plain Grain pipeline over the training documents."""
    (source,) = corpus.sources
    starts_D, targets_D = source.split("train")
    length = config.sequence_length
    if packing == "best_fit":  # Grain's packers take no document longer than a row
        starts_D, targets_D = _chunks(starts_D, targets_D, length)

    def document(index: int) -> dict[str, np.ndarray]:
        ids = source.tokens[starts_D[index] : starts_D[index] + targets_D[index] + 1].astype(np.int32)
        return {name: ids[:-1] if name == "tokens" else ids[1:] for name in features}

    documents = grain.MapDataset.source(range(len(starts_D))).shuffle(seed=config.seed).repeat().map(document).to_iter_dataset()
    lengths = dict.fromkeys(features, length)
    if packing == "best_fit":
        packed: Any = grain.experimental.BestFitPackIterDataset(documents, length_struct=lengths, num_packing_bins=64)
    else:
        packed = grain.experimental.ConcatThenSplitIterDataset(documents, length_struct=lengths)
    return iter(packed.batch(config.batch_size))


def _chunks(starts_D: np.ndarray, targets_D: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = [
        (start + first, min(length, count - first))
        for start, count in zip(starts_D.tolist(), targets_D.tolist(), strict=True)
        for first in range(0, count, length)
    ]
    starts, counts = zip(*pieces, strict=True)
    return np.array(starts), np.array(counts)


def packing_table(config: DataConfig, corpus: Corpus) -> None:
    """Padding, and documents cut although a row would have held them, over one epoch's worth of rows."""
    (source,) = corpus.sources
    _, targets_D = source.split("train")
    count = -(-int(targets_D.sum()) // config.sequence_length)
    fitting = int((targets_D <= config.sequence_length).sum())
    print(f"\n{'packing':16} {'padding':>9} {'cut needlessly':>18} {'planned in':>12}")
    for packing in ("concatenate", "best_fit"):
        started = time.perf_counter()
        rows = TrainingRows(config.replace(packing=packing, shuffle_block_rows=1), corpus)
        planned = time.perf_counter() - started
        whole = {name: n - 1 for name, n in zip(source.names, np.diff(source.offsets_D).tolist(), strict=True)}
        cut = set()
        for row in range(count):
            cut |= {name for name, _, held in rows.documents(row) if held < whole[name] <= config.sequence_length}
        share = f"{len(cut):,} of {fitting:,}"
        print(f"{packing:16} {100 * rows.padding()[0]:8.3f} % {share:>18} {1e3 * planned:9.1f} ms")


if __name__ == "__main__":
    main()
