"""A run of seconds whose Engram table lies in host memory."""

from mlt.config.load import sibling
from mlt.config.run import RunConfig
from mlt.mixers.channel.engram import Engram
from mlt.mixers.channel.swiglu import SwiGLU
from mlt.model.block import Block
from mlt.model.stack import Stack
from mlt.optim.lazy_adam import LazyAdam


def config(steps: int = 8, where: str = "host") -> RunConfig:
    tiny = sibling(__file__, "tiny.py").config(steps=steps, plain=True)
    table = {"rows_per_head": 4000, "head_dim": 8, "heads_per_order": 1, "max_ngram": 2}
    engram = Engram(layer_id=0, layer_ids=(0,), conv=False, pad_token_id=258, hash_on=where, table_on=where, **table)
    return tiny.replace(
        model=tiny.model.replace(stack=Stack(head=(Block(mixers=(engram, SwiGLU(d_ff=32))),))),
        optimizer=tiny.optimizer.replace(tables=LazyAdam(correction="row")),
        evaluation=tiny.evaluation.replace(every_steps=4),
    )
