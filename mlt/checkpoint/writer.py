"""Write one step after another with Orbax: beside its place, renamed when whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mlt.checkpoint.arrays import PIECE_BYTES
from mlt.checkpoint.digest import in_host_memory
from mlt.checkpoint.patient import PatientArrays
from mlt.checkpoint.storage import silence_orbax


class StepWriter:
    """Not for several threads at once; in a run of several processes all of them go through the same calls."""

    def __init__(self) -> None:
        silence_orbax()
        items = ocp.handlers.DefaultCheckpointHandlerRegistry()
        # Trained floats hardly compress; trying costs as much as all the rest of a save.
        types = ocp.type_handlers.create_type_handler_registry((jax.Array, PatientArrays()))
        arrays = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=types)
        words = ocp.JsonCheckpointHandler()
        items.add("state", ocp.args.PyTreeSave, arrays)
        for name in ("data", "meta"):
            items.add(name, ocp.args.JsonSave, words)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(handler_registry=items))

    def start(self, path: Path, arrays: Mapping[str, jax.Array], data: dict[str, Any], meta: dict[str, Any]) -> None:
        """Begin to write a step directory; returns once the arrays are in host memory."""
        stored = {name: array for name, array in arrays.items() if array.size}
        pieces = {name: ocp.SaveArgs(chunk_byte_size=PIECE_BYTES) for name in stored}
        self._orbax.save(
            path,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(stored, save_args=pieces),
                data=ocp.args.JsonSave(data),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def finish(self) -> None:
        """Block until the step is committed; raises whatever kept it from that."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        """Release the threads."""
        self._orbax.close()


def own(array: jax.Array) -> jax.Array:
    """Copy what already is in host memory: it would be written from the very buffer the next step is given."""
    if not in_host_memory(array):
        return array
    # Shard by shard: copying the whole of an array that several processes hold would be a compiled program of its own.
    shards = [jax.device_put(shard.data, shard.data.sharding, may_alias=False) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
