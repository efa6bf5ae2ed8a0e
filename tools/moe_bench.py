"""A mixture of experts against a dense model of equal active FLOPs: time and memory of a train step, in one run.

    python tools/moe_bench.py [--experts 16] [--top 2] [--d-ff 512] [--width 256] [--layers 2] [--length 512] [--rows 4] [...]

Both models have the same attention, embedding and head; the dense one has SwiGLUs as wide as gives it the FLOPs per token of
the routed one, router and shared expert included. `gradient` is loss, forward and backward; `step` is the whole train step,
whose optimizer also updates the experts that a token does not visit. Rounds take the two models in turns. On a CPU the
process is pinned to one core and its processor time counts; the ratios are what is worth reading. Peak bytes are those of the
compiled step: arguments and temporaries, outputs that are no arguments included. `--collapsed` sends all tokens to the same
experts, the worst case of a dropless layer.
"""

import argparse
import functools
import statistics
import time

from mlt.bench import clock

CORE = clock.pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from mlt.loss import reduce_aux, token_losses  # noqa: E402
from mlt.mixers.channel.moe import MoE  # noqa: E402
from mlt.mixers.channel.swiglu import SwiGLU  # noqa: E402
from mlt.mixers.sequence.attention import Attention  # noqa: E402
from mlt.model.block import Block  # noqa: E402
from mlt.model.count import count  # noqa: E402
from mlt.model.lm import LMConfig  # noqa: E402
from mlt.model.remat import Remat  # noqa: E402
from mlt.model.stack import Stack  # noqa: E402
from mlt.nn.param import merge, partition  # noqa: E402
from mlt.optim.adamw import AdamW  # noqa: E402
from mlt.optim.schedule import WarmupCosine  # noqa: E402
from mlt.parallel.mesh import Layout  # noqa: E402
from mlt.train.state import create_state  # noqa: E402
from mlt.train.step import StepOptions, train_step  # noqa: E402
from mlt.verify.material import packed_rows  # noqa: E402

VOCAB = 512


class Side:
    """One model: its counts, its compiled gradient and train step, and the seconds of each round."""

    def __init__(self, feed_forward, words: argparse.Namespace, batch: dict):
        attention = Attention(num_heads=4, head_dim=words.width // 4)
        stack = Stack(period=(Block(mixers=(attention, feed_forward)),), repeats=words.layers)
        config = LMConfig(d_model=words.width, vocab_size=VOCAB, stack=stack)
        specs = config.build(None)
        self.count = count(config, specs, words.length)
        rules = Layout().rules(jax.devices()[:1])
        optimizer = AdamW(learning_rate=1e-3).transformation(partition(specs)[0], WarmupCosine(warmup_steps=1), 1000)
        state = create_state(specs, optimizer, rules, 0)
        if words.collapsed and isinstance(feed_forward, MoE):
            bias = state.model.stack.period[0].sub_layers[1].mixer.router_bias
            favour = jnp.zeros(bias.shape).at[:, : words.top].set(9.0)
            state.model.stack.period[0].sub_layers[1].mixer.router_bias = bias.replace(favour)
        remat, dtype = Remat(mode="none"), jnp.dtype(words.dtype)
        options = StepOptions(rules=rules, remat=remat, dtype=dtype)

        def objective(trained, buffers, batch):
            losses, aux = token_losses(merge(trained, buffers), batch, rules, dtype=dtype, remat=remat, train=True)
            return jnp.sum(losses) + reduce_aux(aux)[0]

        batch = jax.device_put(batch, rules.sharding(("batch", "seq")))
        gradient = jax.jit(jax.grad(objective)).lower(*partition(state.model), batch).compile()
        step = jax.jit(functools.partial(train_step, optimizer=optimizer, options=options)).lower(state, batch).compile()
        self.fullest = 1 + float(step(state, batch)[1].get("aux/max_violation", 0))
        # Nothing is donated, so that every call does the same work.
        self.calls = {"gradient": lambda: gradient(*partition(state.model), batch), "step": lambda: step(state, batch)}
        memory = step.memory_analysis()
        self.peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        self.seconds = {name: [] for name in self.calls}

    def turn(self, name: str) -> None:
        jax.block_until_ready(self.calls[name]())
        now = time.process_time if CORE is not None else time.perf_counter
        started = now()
        jax.block_until_ready(self.calls[name]())
        self.seconds[name].append(now() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"experts": 16, "top": 2, "shared": 0, "d-ff": 512, "width": 256, "layers": 2, "length": 512, "rows": 4, "rounds": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", help="compute type")
    parser.add_argument("--collapsed", action="store_true", help="send every token to the same experts")
    words = parser.parse_args()
    routed = MoE(num_experts=words.experts, num_experts_per_token=words.top, num_shared_experts=words.shared, d_ff=words.d_ff)
    dense = SwiGLU(d_ff=round(routed.flops_per_token(words.width, words.length) / (6 * words.width)))
    batch = packed_rows(np.random.default_rng(0), rows=words.rows, length=words.length, num_ids=VOCAB)
    sides = {"experts": Side(routed, words, batch), "dense": Side(dense, words, batch)}
    kind = jax.devices()[0].device_kind
    print(f"JAX {jax.__version__}, {kind}{', one pinned core, processor time' if CORE is not None else ''}, {words.dtype}")
    print(
        f"{words.rows} x {words.length} tokens, {words.layers} layers of width {words.width}; dense: {dense.d_ff} hidden units;"
    )
    print(f"{words.experts} experts of {words.d_ff}, {words.top} a token, {words.shared} shared;", end=" ")
    print(f"the fullest has {sides['experts'].fullest:.2f} of the mean load")
    for round_ in range(words.rounds):
        for name in ("gradient", "step"):
            for side in list(sides.values())[:: 1 if round_ % 2 else -1]:
                side.turn(name)
    print(f"{'':>8} {'params':>11} {'active':>10} {'MFLOP/token':>12} {'gradient ms':>12} {'step ms':>9} {'peak MiB':>9}")
    for name, side in sides.items():
        found = side.count
        gradient, step = (1e3 * statistics.median(side.seconds[call]) for call in ("gradient", "step"))
        mflop = 3 * found.flops_per_token / 1e6
        counts = f"{found.params:11,d} {found.active_params:10,d} {mflop:12.3f}"
        print(f"{name:>8} {counts} {gradient:12.1f} {step:9.1f} {side.peak / 2**20:9.1f}")
    for name in ("gradient", "step"):
        pairs = zip(*(side.seconds[name] for side in sides.values()), strict=True)
        ratios = [experts / dense for experts, dense in pairs]
        shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"experts over dense, {name}: median {statistics.median(ratios):.2f}, rounds {shown}")


if __name__ == "__main__":
    main()
