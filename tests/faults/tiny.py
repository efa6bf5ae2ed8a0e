"""A run of seconds: two recurrent blocks and an attention block on made-up text."""

from mlt.config.run import CheckpointConfig, EvalConfig, RunConfig, SampleConfig, TrainConfig
from mlt.data.loader import DataConfig
from mlt.data.synthetic import SyntheticText
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupCosine
from mlt.report.sinks import LogConfig


def config(steps: int = 24, width: int = 32, plain: bool = False) -> RunConfig:
    """`plain` leaves the attention block alone: for tests of many processes, each of which compiles."""
    delta, attention = GatedDelta(num_heads=2, key_dim=16), Attention(num_heads=2, head_dim=16)
    experts = MoE(num_experts=4, num_experts_per_token=2, d_ff=16)
    period = (Block(mixers=(delta, experts)), Block(mixers=(attention, SwiGLU(d_ff=32))))
    return RunConfig(
        model=LMConfig(d_model=width, vocab_size=272, stack=Stack(period=period[1:] if plain else period, repeats=1)),
        data=DataConfig(source=SyntheticText(num_documents=60), sequence_length=64, batch_size=4),
        train=TrainConfig(steps=steps, compute_dtype="float32"),
        optimizer=AdamW(learning_rate=3e-3),
        schedule=WarmupCosine(warmup_steps=4),
        checkpoint=CheckpointConfig(every_steps=4, keep=3),
        evaluation=EvalConfig(every_steps=10, max_rows=8),
        sample=SampleConfig(tokens=0),
        log=LogConfig(every_steps=1),
    )
