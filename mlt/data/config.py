"""The data section of a run."""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field

from mlt.config.base import Config
from mlt.config.problems import ConfigError, Problem, walk
from mlt.data.cluster_rows import Clusters, DocumentClusters
from mlt.data.mixture import Mixture, Weighted
from mlt.data.neighbours import Neighbours
from mlt.data.sources import Source
from mlt.data.stdlib_source import PythonStdlib
from mlt.data.synthetic import SyntheticText
from mlt.data.token_cache import TokenCache
from mlt.data.tokenize import ByteTokenizer, Tokenizer


class DataConfig(Config):
    """What to read and how to cut it into batches. Building one reads nothing; see `check_files`.

    Attributes:
        source: one source of documents, or a mixture.
        tokenizer: how text becomes ids.
        sequence_length: T, tokens per row.
        batch_size: rows of the global batch, over all hosts; also of a validation batch.
        seed: fixes the order of documents, rows and mixture.
        validation_fraction: share of documents kept for validation, chosen by the hash of their content, so
            adding documents moves none from one side to the other. 0 keeps none.
        shuffle_documents: draw a new order of the documents each epoch; False keeps the source's order.
        shuffle_block_rows: rows are permuted within blocks of this many; 1 keeps them in the order of the
            documents.
        packing: "concatenate" cuts documents where rows end and leaves no padding; "best_fit" cuts only documents longer
            than a row and pads.
        packing_window: documents that best_fit packs together.
        prefetch_batches: batches prepared ahead by background threads; 0 prepares each when it is asked for.
        max_bad_records: records that may be left out, over all sources, because they cannot be read as text; one more
            ends the run.
        cache: where tokenised documents are kept for the next start; None keeps none.
        clusters: the clusters of the documents, for models that fetch weights by them; None has none.
        neighbours: distributions of the next token to train on beside it (`train.neighbour_weight`); None has none.
    """

    source: Source | Mixture = PythonStdlib()
    tokenizer: Tokenizer = ByteTokenizer()
    sequence_length: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)] = 0
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    shuffle_documents: bool = True
    shuffle_block_rows: Annotated[int, Field(ge=1)] = 1024
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    packing_window: Annotated[int, Field(ge=1)] = 65_536
    prefetch_batches: Annotated[int, Field(ge=0)] = 4
    max_bad_records: Annotated[int, Field(ge=0)] = 0
    cache: TokenCache | None = None
    clusters: DocumentClusters | None = None
    neighbours: Neighbours | None = None

    def problems(self) -> Iterable[Problem]:
        wanted = self.clusters is not None and self.clusters.from_records
        many = isinstance(self.source, Mixture)
        for number, part in enumerate(self.parts):
            source, where = part.source, f"source.parts[{number}].source" if many else "source"
            if wanted and source.cluster_setting is None:
                rule = "brings no clusters, and data.clusters takes them from the records"
                yield Problem(where, type(source).__name__, rule, "place documents by their words: clusters=Clusters(...)")
            elif wanted and not source.names_clusters:
                rule = "names no field, and data.clusters takes clusters from the records"
                yield Problem(f"{where}.{source.cluster_setting}", None, rule, "name the field that holds them")
            elif source.names_clusters and not wanted:
                path = f"{where}.{source.cluster_setting}"
                ways_out = "set data.clusters to RecordClusters(...) of mlt.data.cluster_rows, or leave it None"
                yield Problem(path, getattr(source, str(source.cluster_setting)), "is read with such clusters alone", ways_out)

    @property
    def parts(self) -> tuple[Weighted, ...]:
        """The sources with their weights; a single source has the weight 1."""
        return self.mixture.parts

    @property
    def mixture(self) -> Mixture:
        """The mixture; a single source is one of one part."""
        return self.source if isinstance(self.source, Mixture) else Mixture(parts=(Weighted(source=self.source),))

    @property
    def tokens_per_batch(self) -> int:
        """Positions in one global training batch: all targets where packing is "concatenate"."""
        return self.batch_size * self.sequence_length

    def check_files(self, path: str = "data") -> None:
        """Looks for every file named here, without reading a document.

        Raises:
            ConfigError: all that is missing or not usable; `path` is where this section stands in the config.
        """
        nodes = [
            (where, node) for where, node in walk(self, path) if isinstance(node, Source | Tokenizer | Clusters | Neighbours)
        ]
        problems = [problem.under(where) for where, node in nodes for problem in node.file_problems()]
        if problems:
            raise ConfigError(problems)

    @classmethod
    def example(cls) -> Self:
        return cls(source=SyntheticText.example(), sequence_length=128, batch_size=4)
