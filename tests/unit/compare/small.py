"""A run of a second: one block on made-up text, on the eight devices of the tests."""

from mlt.config.run import CheckpointConfig, EvalConfig, RunConfig, SampleConfig, TrainConfig
from mlt.data.loader import DataConfig
from mlt.data.synthetic import SyntheticText
from mlt.mixers.channel.mlp import MLP
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.optim.adamw import AdamW
from mlt.parallel.mesh import Layout
from mlt.report.sinks import LogConfig


def config(d_ff: int = 8, rate: float = 3e-3, documents: int = 30, steps: int = 40) -> RunConfig:
    stack = Stack(head=(Block(mixers=(MLP(d_ff=d_ff),)),))
    return RunConfig(
        model=LMConfig(d_model=8, vocab_size=272, stack=stack, tie_embeddings=True),
        data=DataConfig(source=SyntheticText(num_documents=documents), sequence_length=16, batch_size=8),
        train=TrainConfig(steps=steps, compute_dtype="float32"),
        optimizer=AdamW(learning_rate=rate),
        mesh=Layout(replica=8),
        checkpoint=CheckpointConfig(every_steps=10),
        evaluation=EvalConfig(every_steps=steps, max_rows=4),
        sample=SampleConfig(tokens=0),
        log=LogConfig(every_steps=1),
    )
