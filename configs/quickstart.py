"""A byte-level hybrid on the Python standard library's own sources: minutes on two CPU cores, no download.

Every family of the project is in it: gated delta rule and Mamba-2 recurrences, softmax attention, mixture of experts,
a product-key memory layer and Engram. Try `--arg width=256` or `--set train.steps=1000`.
"""

from mlt.config.run import CheckpointConfig, EvalConfig, RunConfig, SampleConfig, TrainConfig
from mlt.data.loader import DataConfig
from mlt.data.stdlib_source import PythonStdlib
from mlt.data.tokenize import ByteTokenizer
from mlt.mixers.channel.engram import Engram
from mlt.mixers.channel.moe import MoE
from mlt.mixers.channel.product_key_memory import ProductKeyMemory
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.gated_delta import GatedDelta
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.remat import Remat
from mlt.model.stack import Stack
from mlt.optim.adamw import AdamW
from mlt.optim.schedule import WarmupCosine
from mlt.report.sinks import LogConfig


def config(width: int = 128, steps: int = 100, sequence_length: int = 512, batch_size: int = 4) -> RunConfig:
    heads = width // 32
    delta = GatedDelta(num_heads=heads, key_dim=32)
    ssd = Mamba2(num_heads=2 * heads, head_dim=32, state_dim=32)
    attention = Attention(num_heads=heads, head_dim=32, num_kv_heads=max(heads // 2, 1), qk_norm=True)
    engram = Engram(layer_id=0, layer_ids=(0,), rows_per_head=4096, head_dim=16, heads_per_order=2)
    experts = MoE(num_experts=8, num_experts_per_token=2, num_shared_experts=1, d_ff=width // 2)
    memory = ProductKeyMemory(num_keys=32, num_selected=8, num_heads=2, key_dim=64)
    stack = Stack(
        head=(Block(mixers=(engram, ssd, SwiGLU(d_ff=2 * width))),),
        period=(Block(mixers=(delta, experts)), Block(mixers=(attention, memory))),
        repeats=2,
    )
    return RunConfig(
        model=LMConfig(d_model=width, vocab_size=272, stack=stack),
        data=DataConfig(
            source=PythonStdlib(),
            tokenizer=ByteTokenizer(),
            sequence_length=sequence_length,
            batch_size=batch_size,
        ),
        train=TrainConfig(steps=steps, compute_dtype="float32"),
        optimizer=AdamW(learning_rate=3e-3),
        schedule=WarmupCosine(warmup_steps=20),
        remat=Remat(mode="none"),
        checkpoint=CheckpointConfig(every_steps=50),
        evaluation=EvalConfig(every_steps=50, max_rows=64),
        sample=SampleConfig(prompt="def ", tokens=200),
        log=LogConfig(every_steps=5),
    )
