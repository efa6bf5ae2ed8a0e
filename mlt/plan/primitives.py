"""Primitives by what they do to memory, and what a traced operation says of itself."""

from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALIASES = _names(
    "name copy copy_p reshard optimization_barrier stop_gradient squeeze expand_dims reshape transpose bitcast_convert_type "
    "mesh_cast pvary device_put reduce_precision sharding_constraint"
)
"""The result is the operand, or lies where it lies."""

FUSED = _names(
    "abs add add_any and atan2 cbrt ceil clamp complex conj convert_element_type cos cosh div eq erf erf_inv exp exp2 expm1 "
    "floor ge gt imag integer_pow is_finite le lt le_to lt_to log log1p logistic max min mul ne neg nextafter not or pow real "
    "rem round rsqrt select_n shift_left shift_right_logical shift_right_arithmetic sign sin sinh sqrt square sub tan tanh xor "
    "broadcast_in_dim iota slice pad rev concatenate dynamic_slice gather split stack random_bits random_wrap random_unwrap"
)
"""Made where it is used."""

PARTS = _names("slice dynamic_slice split gather")
"""Of `FUSED`: what reads a part of its operand."""

REDUCTIONS = _names("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin")
SUMS = frozenset(("add", "add_any"))
PASSED_ON = _names("convert_element_type neg reshape transpose squeeze expand_dims copy name")
"""What may be done to the parts of a sum before they are added up."""

IN_PLACE = _names("dynamic_update_slice scatter scatter-add scatter_add scatter_max scatter_min scatter_mul")
COLLECTIVES = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}
"""Primitive inside `shard_map` -> what XLA calls it."""


OPAQUE = _names("pallas_call triton_kernel_call ffi_call custom_call mosaic_gpu_p tpu_custom_call")
CALLS = _names("jit pjit closed_call core_call remat2 checkpoint custom_jvp_call custom_vjp_call custom_lin")
NO_CALLS = OPAQUE | {"reduce", "reduce_window", "sort", "scatter", "scatter-add"}


def memory_of(eqn: Any) -> bool | None:
    """Whether a `device_put` goes to the host's memory; None of one that changes no memory."""
    asked = " ".join(str(where) for where in eqn.params.get("devices", ()))
    if "pinned_host" in asked or "Host" in asked:
        return True
    return False if "device" in asked.lower() else None


def scan_parts(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried; the others are read slice by slice."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carried, _ = (list(part) for part in eqn.params["ft_in"].update(eqn.invars).unpack())  # JAX 0.12
    return len(consts), len(carried)


def source(eqn: Any) -> str:
    """The innermost function of ours that an operation came from, with the folder and file it is in."""
    for frame in getattr(eqn.source_info.traceback, "frames", ()):
        parts = frame.file_name.replace("\\", "/").split("/")
        if "mlt" in parts or "mlt_kernels" in parts:
            return f"{'/'.join(parts[-2:])}, {frame.function_name}"
    return str(eqn.source_info.name_stack)


def called(eqn: Any) -> Any:
    """The closed program that a call runs once; None of anything else."""
    if eqn.primitive.name in NO_CALLS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        if inner is not None:
            return inner if hasattr(inner, "consts") else _Open(inner)
    return None


class _Open:
    """A program without constants of its own."""

    def __init__(self, jaxpr: Any) -> None:
        self.jaxpr, self.consts = jaxpr, ()
