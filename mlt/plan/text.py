"""The resolved plan of a run as text: what will be trained, how it is laid out, and with which backends."""

from typing import Any

from mlt_kernels import dispatch

from mlt.config.run import RunConfig
from mlt.model.count import count, decoding_bytes
from mlt.model.edges import PARTS, SCANNED
from mlt.model.lm import LM
from mlt.model.stack import Stack
from mlt.nn.param import named_leaves
from mlt.parallel import crossings
from mlt.plan.memory import device_bytes, memory_lines
from mlt.plan.tables import table_lines
from mlt.report.text import byte_size

LONG = 131_072
"""Tokens after which the plan says what decoding keeps."""


def plan_text(config: RunConfig, specs: LM, hosts: int = 1) -> str:
    """One screen. Needs no device and no data.

    Args:
        config: a checked config.
        specs: its described model.
        hosts: parts in which tables in host memory are split (`residents.host_groups`).
    """
    seq_len = config.data.sequence_length
    total = count(config.model, specs, seq_len)
    mesh = " * ".join(f"{axis}={size}" for axis, size in config.mesh.shape().items() if size > 1) or "one device"
    stack = config.model.stack
    lines = [
        f"model        {total.params:,} parameters, {total.table_params:,} of them in tables; "
        f"{total.active_params:,} active per token",
        f"stack        {stack.num_layers} layers: {_parts(stack)}",
        *(f"             {line}" for line in _layers(config)),
        *([f"streams      {_streams(stack)}"] if stack.hyper_connections else []),
        f"compute      {_flops(3 * total.flops_per_token)} per token (forward and backward), {config.train.compute_dtype}",
        f"decoding     {total.state_values:,} state values per sequence after {seq_len:,} tokens; "
        f"{byte_size(decoding_bytes(specs, LONG))} after {LONG:,}, recurrent states in float32 and the rest in bfloat16",
        f"batch        {config.data.batch_size:,} rows of {seq_len:,} tokens{_micro(config)}; "
        f"{config.train.steps:,} steps, {config.train.steps * config.data.batch_size * seq_len:,} tokens",
        f"mesh         {mesh}; about {byte_size(device_bytes(config, specs, hosts))} of parameters, gradients and "
        "optimizer state per device",
        *(f"host memory  {line}" for line in memory_lines(config, specs, hosts)),
        *([f"sequence     {'; '.join(_crossings(config))}"] if config.mesh.context > 1 else []),
        *([f"distill      {_distilled(config, specs)}"] if config.train.distill else []),
        *([f"tables       {'; '.join(tables)}"] if (tables := table_lines(config, specs, hosts)) else []),
        f"memory       {'; '.join(config.remat.describe())}",
        f"backends     {', '.join(_backends(config))}",
    ]
    return "\n".join(lines) + "\n"


def _flops(value: float) -> str:
    return f"{value / 1e9:,.1f} GFLOP" if value >= 1e9 else f"{value / 1e6:,.1f} MFLOP"


def _micro(config: RunConfig) -> str:
    count = config.train.grad_accumulation
    return f" in {count} micro-batches" if count > 1 else ""


def _streams(stack: Stack) -> str:
    """How many residual streams there are; everything that is kept of the stream is kept of all of them."""
    config: Any = stack.hyper_connections
    own = sum(mixer.num_branches > 1 for mixer in stack.mixers())
    taking = f"; {own} sub-layers take all of them" if own else ""
    return f"{config.streams} residual streams, {config.kind} hyper-connections{taking}; kept inputs of sub-layers are as wide"


def _distilled(config: RunConfig, specs: LM) -> str:
    """What a student learns from its teacher, and how much of it does."""
    distill: Any = config.train.distill
    parameters = [spec for _, spec in named_leaves(specs) if spec.trainable]
    trained = sum(spec.size for name, spec in named_leaves(specs) if spec.trainable and distill.trains(name))
    step = "its last step" if distill.step is None else f"step {distill.step}"
    of = f"{distill.match} of {distill.teacher} at {step}, whose parameters are held beside the state"
    what = of if distill.listens else f"the data alone, with {distill.teacher} at {step} as teacher by name"
    start = "" if distill.start is None else f"; starts from {distill.start}"
    return f"{what}{start}; trains {trained:,} of {sum(spec.size for spec in parameters):,} parameters"


def _crossings(config: RunConfig) -> list[str]:
    """How each kind of layer crosses sequence shards."""
    mesh, found = config.mesh, []
    for mixer in config.model.stack.mixers():
        kind = getattr(mixer, "context", None)
        if kind == "ring":
            shape = ring_shape(config, mixer)
            kind = getattr(mixer, "exchange", None) or mesh.attention or crossings.choose(**shape, size=mesh.context)
        elif kind == "carry":
            kind = f"carry by {getattr(mixer, 'exchange', None) or mesh.carry}"
        if kind is not None:
            found.append(f"{type(mixer).__name__}: {kind}")
    return list(dict.fromkeys(found))


def ring_shape(config: RunConfig, mixer: Any) -> dict[str, Any]:
    """What decides how an attention layer crosses sequence shards: row length, heads of a tensor shard, window."""
    heads, tensor = mixer.num_heads, config.mesh.tensor
    kv_heads = getattr(mixer, "kv_heads", heads)
    shape = {"heads": max(heads // tensor, 1), "kv_heads": max(kv_heads // tensor, 1)}
    return {**shape, "tokens": config.data.sequence_length, "window": getattr(mixer, "window", None)}


def _parts(stack: Stack) -> str:
    """How many blocks each part has, and how often it runs; an upper half only where there is one."""
    shown = [part for part in PARTS if getattr(stack, part) or part in ("head", "period", "tail")]
    return ", ".join(f"{part} {len(getattr(stack, part))}" + f" x {stack.times(part)}" * (part in SCANNED) for part in shown)


def _layers(config: RunConfig) -> list[str]:
    lines = []
    for part in PARTS:
        for block in getattr(config.model.stack, part):
            lines.append(f"{part}: {' + '.join(type(mixer).__name__ for mixer in block.mixers)}")
    return lines


def _backends(config: RunConfig) -> list[str]:
    """Default backend of every op, and the names that mixers ask for."""
    mixers = config.model.stack.mixers()
    kernels = {(mixer.op, mixer.kernel) for mixer in mixers if mixer.op is not None and mixer.kernel is not None}
    asked = {f"{op}: {names if isinstance(names, str) else ', '.join(names)}" for op, names in kernels}
    used = {mixer.op for mixer in mixers if mixer.op is not None} | {"cross_entropy"}
    defaults = [f"{op}: {dispatch.order(op)[0]}" for op in sorted(used)]
    return defaults + [f"asked for by name, {name}" for name in sorted(asked)]
