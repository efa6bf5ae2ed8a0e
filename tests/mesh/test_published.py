"""Published values and shared parameters over eight simulated devices: what one device computes, decoding aside."""

import numpy as np
import pytest

from mlt.config.load import load_config
from mlt.mixers.sequence.attention import Attention
from mlt.mixers.sequence.cross_attention import CrossAttention
from mlt.mixers.sequence.gmu import GMU
from mlt.mixers.sequence.mamba2 import Mamba2
from mlt.mixers.sequence.short_conv import ShortConv
from mlt.mixers.sequence.zamba import SharedTransformer, ZambaLayer
from mlt.model.block import Block
from mlt.model.lm import LMConfig
from mlt.model.stack import Stack
from mlt.parallel.mesh import Layout
from mlt.verify.material import packed_rows
from mlt.verify.mesh import MeshStep, compare

KEYS = {"num_heads": 2, "head_dim": 8, "num_kv_heads": 2}
TRANSFORMER = SharedTransformer(num_heads=2, head_dim=16, d_ff=24)
ZAMBA = ZambaLayer(name="block", transformer=TRANSFORMER, memory=ShortConv(), adapter_rank=2)


def blocks(*mixers) -> tuple[Block, ...]:
    return tuple(Block(mixers=(mixer,)) for mixer in mixers)


STACK = Stack(
    head=blocks(Attention(**KEYS, publish="keys")),
    period=blocks(Mamba2(num_heads=4, head_dim=8, state_dim=4, publish="late"), CrossAttention(source="keys", **KEYS)),
    repeats=2,
    upper=blocks(ZAMBA),
    upper_repeats=2,
    tail=blocks(GMU(source="late", memory_dim=32), ZAMBA),
)


def test_eight_devices_compute_what_one_does(request):
    config = load_config(request.config.rootpath / "configs/families/yoco.py")
    config = config.replace(model=LMConfig(d_model=16, vocab_size=272, stack=STACK))
    layout = Layout(fsdp=2, context=2, tensor=2, carry="permute", attention="ring")
    batch = packed_rows(np.random.default_rng(0), rows=2, length=48, num_ids=64)
    single, other = (MeshStep(config, which, batch, quick=True) for which in (Layout(), layout))
    for name, (error, bound) in compare(single, other).items():
        assert error <= bound, f"{name}: {error:.1e}, bound {bound:.1e}"
    assert other()[0]["train/loss"] == pytest.approx(single()[0]["train/loss"], rel=1e-5)
