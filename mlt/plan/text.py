"""The resolved plan of a run as text: what will be trained, how it is laid out, and with which backends."""

from mlt_kernels import dispatch

from mlt.config.run import RunConfig
from mlt.model.count import count
from mlt.model.lm import LM


def plan_text(config: RunConfig, specs: LM) -> str:
    """One screen. Needs no device and no data.

    Args:
        config: a checked config.
        specs: its described model.
    """
    seq_len = config.data.sequence_length
    total = count(config.model, specs, seq_len)
    bytes_per_device = 16 * total.params / (config.mesh.fsdp * config.mesh.tensor)
    mesh = " * ".join(f"{axis}={size}" for axis, size in config.mesh.shape().items() if size > 1) or "one device"
    stack = config.model.stack
    lines = [
        f"model        {total.params:,} parameters, {total.table_params:,} of them in tables; "
        f"{total.active_params:,} active per token",
        f"stack        {stack.num_layers} layers: head {len(stack.head)}, period {len(stack.period)} x {stack.repeats}, "
        f"tail {len(stack.tail)}",
        *(f"             {line}" for line in _layers(config)),
        f"compute      {3 * total.flops_per_token / 1e6:,.1f} MFLOP per token (forward and backward), "
        f"{config.train.compute_dtype}",
        f"decoding     {total.state_values:,} state values per sequence after {seq_len:,} tokens",
        f"batch        {config.data.batch_size} rows of {seq_len:,} tokens, {config.train.grad_accumulation} micro-batch(es); "
        f"{config.train.steps:,} steps, {config.train.steps * config.data.batch_size * seq_len:,} tokens",
        f"mesh         {mesh}; about {bytes_per_device / 2**20:,.0f} MiB of parameters, gradients and AdamW state per device",
        f"memory       {'; '.join(config.remat.describe())}",
        f"backends     {', '.join(_backends(config))}",
    ]
    return "\n".join(lines) + "\n"


def _layers(config: RunConfig) -> list[str]:
    lines = []
    for part in ("head", "period", "tail"):
        for block in getattr(config.model.stack, part):
            lines.append(f"{part}: {' + '.join(type(mixer).__name__ for mixer in block.mixers)}")
    return lines


def _backends(config: RunConfig) -> list[str]:
    """Default backend of every op, and the names that mixers ask for."""
    mixers = config.model.stack.mixers()
    asked = {f"{mixer.op}: {mixer.kernel}" for mixer in mixers if mixer.op is not None and mixer.kernel is not None}
    used = {mixer.op for mixer in mixers if mixer.op is not None} | {"cross_entropy"}
    defaults = [f"{op}: {dispatch.order(op)[0]}" for op in sorted(used)]
    return defaults + [f"asked for by name, {name}" for name in sorted(asked)]
