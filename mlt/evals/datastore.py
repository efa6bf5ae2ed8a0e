"""A datastore of a run (kNN-LM, arXiv 1911.00172): the hidden state in front of every token of a corpus, and that token.

`build` writes it, `search` makes of it the targets that `mlt.data.neighbours` reads. Both write a folder whole or not at all.
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlt.config.run import RunConfig
from mlt.data.config import DataConfig
from mlt.data.corpus import Corpus, TokenizedSource
from mlt.data.load_corpus import load_corpus
from mlt.data.neighbours import FILES, HEADER, digest_of
from mlt.errors import UserError
from mlt.evals.nearest import distribution, neighbours_of_all
from mlt.loss import context_of
from mlt.model.first_layers import first_layers
from mlt.model.lm import LM
from mlt.parallel.rules import Rules
from mlt.train.load import load_model

Say = Callable[[str], None]
STORE = "datastore.json"
MOST_ENTRIES = 2**31 - 1


def build(
    run_dir: Path,
    folder: Path,
    *,
    say: Say,
    data: DataConfig | None = None,
    step: int | None = None,
    layer: int | None = None,
    window: int | None = None,
    overlap: int | None = None,
    rows: int = 8,
) -> None:
    """Run a model over the documents for training and write an entry for each of their targets.

    Files: `keys.npy` (N, D) float32, `next_tokens.npy` (N,), `documents.npy` (N,) int32, numbered through all sources, and
    `offsets.npy` (N,) int32, the place in its document of the token that the key is the state of. Documents are read from
    their starts in windows, each `overlap` tokens into the one before, so a key sees at least so many tokens of its document
    (or all before it), and does not depend on how rows are packed.

    Args:
        run_dir, step: the model; the newest checkpoint by default.
        data: of the documents; the run's own by default. Tokenizers must be equal.
        layer: the stream behind so many layers; None takes the final states, behind the last norm.
        window, overlap: tokens; the run's row length and a half of it by default.
        rows: windows that are run at once.

    Raises:
        UserError: the run or the documents cannot be read, or an option does not fit them.
    """
    config, model, step = load_model(run_dir, step)
    data = config.data if data is None else data.replace(neighbours=None)
    window = window or config.data.sequence_length
    overlap = window // 2 if overlap is None else overlap
    _check(config, data, layer, window, overlap, rows)
    corpus = load_corpus(data)
    total = sum(int(source.split("train")[1].sum()) for source in corpus.sources)
    if total > MOST_ENTRIES:
        raise UserError(f"{total:,} entries: a datastore has at most {MOST_ENTRIES:,}; use fewer documents")
    D, largest = config.model.d_model, config.data.tokenizer.vocab_size
    say(f"{total:,} entries of {D} values, {total * D * 4 / 1e9:.2f} GB")
    states = _states(config, model if layer is None else first_layers(model, layer), layer is not None)
    with _whole(folder) as draft:
        make = functools.partial(np.lib.format.open_memmap, mode="w+")
        keys_ND = make(draft / "keys.npy", dtype=np.float32, shape=(total, D))
        next_N = make(draft / "next_tokens.npy", dtype=np.uint16 if largest <= 2**16 else np.uint32, shape=(total,))
        document_N, offset_N = (make(draft / f"{name}.npy", dtype=np.int32, shape=(total,)) for name in ("documents", "offsets"))
        for first, part in _entries(corpus, states, window, overlap, rows):
            stop = first + len(part[0])
            keys_ND[first:stop], next_N[first:stop], document_N[first:stop], offset_N[first:stop] = part
            if not np.isfinite(part[0]).all():
                raise UserError(f"{run_dir}: hidden states of step {step} are not finite, so they have no neighbours")
        header = {
            "entries": total,
            "sources": [source.hash for source in corpus.sources],
            "tokenizer": data.tokenizer.digest,
            "made_from": {"run": Path(run_dir).name, "step": step, "layer": layer, "window": window, "overlap": overlap},
        }
        for array in (keys_ND, next_N, document_N, offset_N):
            array.flush()
        (draft / STORE).write_text(json.dumps(header, indent=2))
    say(f"wrote {folder}")


def search(
    store: Path, folder: Path, *, say: Say, neighbours: int, temperature: float, width: int | None = None
) -> dict[str, Any]:
    """Find the neighbours of every entry of a datastore, its own left out, and write the distributions they give.

    Args:
        store: made by `build`.
        neighbours: how many count (K).
        temperature: of exp(-squared distance / T).
        width: tokens kept of a distribution, the likeliest; None takes K, which keeps all.

    Returns:
        What the folder says of itself: entries, width, digest, sources.

    Raises:
        UserError: there is no datastore, or an option does not fit it.
    """
    width = min(width or neighbours, neighbours)
    header, keys_ND, next_N = _opened(store)
    N = len(keys_ND)
    if not 0 < neighbours < N:
        raise UserError(f"--neighbours {neighbours}: must lie in [1, {N - 1}]: {store} has {N:,} entries")
    if not temperature > 0:
        raise UserError(f"--temperature {temperature}: must be positive")
    say(f"{N:,} entries against {N:,}: {N * N * keys_ND.shape[1] / 1e12:.2f}e12 multiply-adds")
    hits, kept, farthest = 0.0, 0.0, 0.0
    with _whole(folder) as draft:
        make = functools.partial(np.lib.format.open_memmap, mode="w+", shape=(N, width))
        ids_NW = make(draft / FILES["ids"], dtype=np.int32)
        probabilities_NW = make(draft / FILES["probabilities"], dtype=np.float32)
        for first, number, distance in neighbours_of_all(keys_ND, neighbours):
            ids, probabilities, share = distribution(next_N[number], distance, temperature, width)
            stop = first + len(ids)
            ids_NW[first:stop], probabilities_NW[first:stop] = ids, probabilities
            hits += float(np.sum(probabilities * (ids == next_N[first:stop, None].astype(np.int64))))
            kept, farthest = kept + float(share.sum()), farthest + float(distance[:, -1].sum())
        options = {"neighbours": neighbours, "temperature": temperature}
        facts = {"entries": N, "width": width, "sources": header["sources"], "tokenizer": header["tokenizer"]}
        found = {**facts, "digest": digest_of(facts, (ids_NW, probabilities_NW)), "made_from": {**header["made_from"], **options}}
        for array in (ids_NW, probabilities_NW):
            array.flush()
        (draft / HEADER).write_text(json.dumps(found, indent=2))
    say(f"mean probability of the true token {hits / N:.4f}, share of the mass kept {kept / N:.4f}")
    say(f"mean squared distance of neighbour {neighbours}: {farthest / N:.2f}")
    return found


def _check(config: RunConfig, data: DataConfig, layer: int | None, window: int, overlap: int, rows: int) -> None:
    layers = config.model.stack.num_layers
    if data.tokenizer.digest != config.data.tokenizer.digest:
        raise UserError("the data's tokenizer is not the run's: their ids mean different tokens. Use the run's tokenizer.")
    if config.data.clusters is not None:
        raise UserError("data.clusters: a datastore's windows have no clusters, and this run's model reads them; use another run")
    if layer is not None and not 0 <= layer <= layers:
        raise UserError(f"--layer {layer}: must lie in [0, {layers}], the run's layers; without it the final states are taken")
    if not 0 <= overlap < window:
        raise UserError(f"--overlap {overlap}: must lie in [0, {window - 1}]: windows have {window} tokens")
    if rows < 1:
        raise UserError(f"--rows {rows}: must be at least 1")


def _states(config: RunConfig, model: LM, raw: bool) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """(batch) -> hidden states (B, T, D) float32: the stream if `raw`, else what the head reads."""

    @jax.jit
    def run(model: LM, batch: Any) -> jax.Array:
        ctx, dtype = context_of(batch, Rules(None), train=False), jnp.dtype(config.train.compute_dtype)
        hidden = model.stream(ctx, dtype=dtype, remat=config.remat)[0] if raw else model(ctx, dtype=dtype, remat=config.remat)[0]
        return hidden.astype(jnp.float32)

    return lambda batch: np.asarray(run(model, batch))


def _entries(corpus: Corpus, states: Any, window: int, overlap: int, rows: int) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """(number of the first, (keys, next tokens, documents, offsets)) of one window's entries after another."""
    held: list[list[tuple[int, int, int, int, int, np.ndarray]]] = [[]]
    room = window

    def finished() -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        shape = (rows, window)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
        for row, pieces in enumerate(held):
            used = 0
            for segment, (*_, ids) in enumerate(pieces, 1):
                place = slice(used, used := used + len(ids) - 1)
                batch["tokens"][row, place] = ids[:-1]
                batch["segment_ids"][row, place] = segment
                batch["positions"][row, place] = np.arange(len(ids) - 1)
        found = states(batch)
        for row, pieces in enumerate(held):
            used = 0
            for entry, document, offset, skip, count, ids in pieces:
                keys = found[row, used + skip : used + skip + count]
                used += len(ids) - 1
                yield entry, (keys, ids[skip + 1 :], np.full(count, document), offset + np.arange(count))

    for entry, document, offset, skip, count, ids in _windows(corpus, window, overlap):
        if len(ids) - 1 > room:
            if len(held) == rows:
                yield from finished()
                held = []
            held.append([])
            room = window
        held[-1].append((entry, document, offset, skip, count, ids))
        room -= len(ids) - 1
    yield from finished()


def _windows(corpus: Corpus, window: int, overlap: int) -> Iterator[tuple[int, int, int, int, int, np.ndarray]]:
    """(first entry, document, offset, tokens seen before, entries, ids with the one behind the window) of every window."""
    entry, before = 0, 0
    for source in corpus.sources:
        for number in np.flatnonzero(~source.held_out_D).tolist():
            ids = _document(source, number)
            for first in range(0, len(ids) - 1, window - overlap):
                skip = overlap if first else 0
                seen = ids[first : first + window + 1]
                count = len(seen) - 1 - skip
                if count <= 0:
                    break
                yield entry, before + number, first + skip, skip, count, seen
                entry += count
        before += len(source.held_out_D)


def _document(source: TokenizedSource, number: int) -> np.ndarray:
    return source.tokens[source.offsets_D[number] : source.offsets_D[number + 1]]


def _opened(store: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    try:
        header = json.loads((Path(store) / STORE).read_text())
        keys, tokens = (np.load(Path(store) / f"{name}.npy", mmap_mode="r") for name in ("keys", "next_tokens"))
    except (OSError, ValueError) as error:
        raise UserError(f"{store}: is no datastore ({error}); make it with tools/datastore.py build") from error
    if len(keys) != header["entries"] or len(tokens) != header["entries"]:
        raise UserError(f"{store}: has {len(keys)} keys and {len(tokens)} tokens, and {STORE} says {header['entries']}")
    return header, keys, tokens


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when the block ends well."""
    folder = Path(os.path.expanduser(folder))
    if folder.exists():
        raise UserError(f"{folder}: exists; choose another folder, or remove it")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
