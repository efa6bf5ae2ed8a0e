"""A position in the stream of training rows: what is saved of it, and when it still means the same."""

from collections.abc import Mapping
from typing import Any

from mlt.data.config import DataConfig
from mlt.data.corpus import Corpus
from mlt.errors import UserError


def position(row: int, config: DataConfig, corpus: Corpus) -> dict[str, Any]:
    """Plain JSON that says where row `row` of the run starts and what was read before it, the same on every host.

    tokens: positions before it, padding included; rows: rows before it; sources: the hash of each source's documents; mixture:
    first row and rows per thousand of each source, of each stage so far; and what else fixes the order.
    """
    return {
        "tokens": row * config.sequence_length,
        "rows": row,
        "sources": [source.hash for source in corpus.sources],
        "mixture": _stages_before(row, config),
        **_order(config),
    }


def row_of(state: Mapping[str, Any], config: DataConfig, corpus: Corpus) -> int:
    """The row at which a saved position stands in the stream of `config` and `corpus`.

    batch_size may differ, and sequence_length where documents are concatenated and the mixture has not changed yet. Sources
    may be added, and stages of the mixture added, changed or removed, if no row before the position changes.

    Raises:
        UserError: the position belongs to another stream; the message says what differs.
    """
    missing = sorted({*position(0, config, corpus)} - set(state))
    if missing:
        raise UserError(
            f"the saved data position lacks {', '.join(missing)}: it was not written by this loader or is "
            "damaged. Restore an older checkpoint."
        )
    _check_sources(state, corpus)
    order = _order(config)
    changed = [f"{name}={order[name]} (saved {state[name]})" for name in order if order[name] != state[name]]
    if changed:
        raise UserError(
            f"the order of the data differs from that of the saved run: data {', '.join(changed)}. "
            "Set the saved values again, or start a new run directory."
        )
    row, rest = divmod(state["tokens"], config.sequence_length)
    if rest:
        raise UserError(
            f"data.sequence_length={config.sequence_length} does not divide the saved position of "
            f"{state['tokens']} tokens. Use a length that divides it, such as the old one or a half of it."
        )
    if row != state["rows"] and len(state["mixture"]) > 1:
        raise UserError(
            f"data.sequence_length={config.sequence_length} differs from that of the saved run, whose mixture changed at row "
            f"{state['mixture'][-1][0]}: that row is another one now. Set the saved length again, or start a new run directory."
        )
    _check_mixture(state, row, config)
    return row


def _check_sources(state: Mapping[str, Any], corpus: Corpus) -> None:
    saved, given = state["sources"], [source.hash for source in corpus.sources]
    if len(given) < len(saved):
        raise UserError(
            f"the saved run read {len(saved)} sources, this config names {len(given)}. Keep them all, in their order; to stop "
            "reading one, give it the weight 0 in a later stage of the mixture."
        )
    for number, (old, new) in enumerate(zip(saved, given, strict=False)):
        if old != new:
            raise UserError(
                f"the documents of {corpus.sources[number].origin} differ from those of the saved run: hash {new}, saved "
                f"{old}. A position in one is no position in the other. Bring the same documents (and, for PythonStdlib, the "
                "same Python version), clusters in their records, tokenizer and validation_fraction back, in the same order of "
                "sources, or start a new run directory."
            )


def _check_mixture(state: Mapping[str, Any], row: int, config: DataConfig) -> None:
    """Every row before `row` must come from where it came from; sources added since had no share in them."""
    given = _stages_before(row, config)
    added = len(given[0][1]) - len(state["mixture"][0][1])
    saved = [[first, [*counts, *[0] * added]] for first, counts in state["mixture"]]
    if given != saved:
        raise UserError(
            f"the mixture of the {row} rows read so far differs from that of the saved run: rows per thousand {_shown(given)}, "
            f"saved {_shown(saved)}. What was read cannot change: set the saved weights again, and change them by a stage "
            f"with from_row={row} or later."
        )


def _stages_before(row: int, config: DataConfig) -> list[list[Any]]:
    return [[first, list(counts)] for first, counts in config.mixture.counts() if first < row or first == 0]


def _shown(stages: list[list[Any]]) -> str:
    return ", ".join(f"{counts} from row {first}" for first, counts in stages)


def _order(config: DataConfig) -> dict[str, Any]:
    packing: str = config.packing
    if config.packing == "best_fit":
        packing += f" of {config.packing_window} documents into {config.sequence_length} tokens"
    return {
        "seed": config.seed,
        "shuffle_documents": config.shuffle_documents,
        "shuffle_block_rows": config.shuffle_block_rows,
        "packing": packing,
    }
