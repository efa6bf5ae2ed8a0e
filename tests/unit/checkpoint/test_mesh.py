"""A checkpoint is of logical arrays: it reads back on another mesh, and two processes agree on what they read."""

import os
import socket
import subprocess
import sys
import textwrap

COMMON = """
import logging, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
from mlt.checkpoint.digest import _device_digest, digests
from mlt.checkpoint.layout import committed_steps, read_leaves
from mlt.checkpoint.restore import restore, restore_latest
from mlt.checkpoint.save import Checkpointer

def value(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(64, 256)).astype(np.float32),
        "b": rng.normal(size=(8,)).astype(jnp.bfloat16),
        "table": rng.integers(0, 2**32, (24, 4), dtype=np.uint32),
        "empty": np.zeros((8, 0), np.float32),
        "step": np.int32(seed),
    }

def place(tree, mesh, specs):
    where = {name: NamedSharding(mesh, specs[name]) for name in tree}
    return {name: jax.make_array_from_callback(x.shape, where[name], lambda i, x=x: x[i]) for name, x in tree.items()}

def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

def mesh(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
"""


def start(code: str, *arguments: object, devices: int) -> subprocess.Popen[str]:
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", COMMON + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(err for _, err in outputs)
    return [out for out, _ in outputs]


def test_eight_devices_save_and_other_meshes_restore(tmp_path):
    finish(
        start(
            """
            want = value()
            fsdp = {"w": P("fsdp"), "b": P(), "table": P("fsdp"), "empty": P("fsdp"), "step": P()}
            keys = jax.random.split(jax.random.key(1), (8, 3))
            saved = place(want, mesh((8,), ("fsdp",)), fsdp)
            saved["keys"] = jax.device_put(keys, NamedSharding(saved["w"].sharding.mesh, P("fsdp")))
            with Checkpointer(sys.argv[1]) as checkpoints:
                checkpoints.save(1, saved, data={}, meta={})
            table = read_leaves(sys.argv[1], 1)

            both = mesh((2, 4), ("fsdp", "tensor"))
            explicit = mesh((4, 2), ("fsdp", "tensor"), AxisType.Explicit)
            other = {"w": P("tensor", "fsdp"), "b": P("fsdp"), "table": P(("fsdp", "tensor")), "empty": P(), "step": P()}
            layouts = [
                (place(want, both, other), NamedSharding(both, P(None, None))),
                (place(want, explicit, other), NamedSharding(explicit, P("fsdp"))),
                ({name: jnp.asarray(x) for name, x in want.items()}, SingleDeviceSharding(jax.devices()[3])),
            ]
            for target, key_sharding in layouts:
                target = abstract(target)
                target["keys"] = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=key_sharding)
                found = restore(sys.argv[1], target).state
                for name, x in want.items():
                    assert np.asarray(found[name]).tobytes() == x.tobytes(), name
                    assert found[name].sharding == target[name].sharding, name
                    assert f"{int(_device_digest(found[name])):08x}" == table[name].digest, name
                assert np.array_equal(jax.random.key_data(found["keys"]), jax.random.key_data(keys))
                assert found["keys"].sharding.is_equivalent_to(key_sharding, 2)

            host = NamedSharding(both, P("fsdp"), memory_kind="pinned_host")
            target = abstract({"w": saved["w"]}) | {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=host)}
            with Checkpointer(sys.argv[2]) as checkpoints:
                checkpoints.save(1, {"w": jax.device_put(want["w"], host)}, data={}, meta={})
            found = restore(sys.argv[2], target).state["w"]
            assert found.sharding.memory_kind == "pinned_host"
            assert np.array_equal(found, want["w"])
            """,
            tmp_path / "plain",
            tmp_path / "host",
            devices=8,
        )
    )


def test_two_processes_save_and_go_back_over_damage_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    code = """
        directory, process, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, process)
        specs = {"w": P("fsdp", "tensor"), "b": P("tensor"), "table": P("fsdp"), "empty": P(), "step": P()}
        devices = mesh((2, 2), ("fsdp", "tensor"))
        with Checkpointer(directory) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, place(value(step), devices, specs), data={"at": step}, meta={})
            checkpoints.wait()
            assert checkpoints.steps() == [1, 2]
            checkpoints.save(3, place(value(3), devices, specs), data={"at": 3}, meta={})
            checkpoints.wait()
            if process == 0:
                for step in (2, 3):
                    files = (directory / str(step) / "state").glob("ocdbt.process_1/d/*")
                    path = max(files, key=lambda path: path.stat().st_size)
                    content = bytearray(path.read_bytes())
                    content[len(content) // 2] ^= 1
                    path.write_bytes(content if step == 2 else content[:99])
            found = checkpoints.restore_latest(abstract(place(value(), devices, specs)))
            assert found.step == 1 and found.data == {"at": 1}
            for name, x in value(1).items():
                for shard in found.state[name].addressable_shards:
                    assert np.array_equal(shard.data, x[shard.index]), name
            checkpoints.save(2, place(value(2), devices, specs), data={"at": 2}, meta={})
        assert committed_steps(directory) == [1, 2]
        saved = {name: leaf.digest for name, leaf in read_leaves(directory, 1).items()}
        assert saved == digests(place(value(1), devices, specs))
        print("done")
        """
    outputs = finish(*(start(code, tmp_path, process, port, devices=2) for process in (0, 1)))
    assert all(output.endswith("done\n") for output in outputs)
    assert (tmp_path / "2.damaged").is_dir()
    assert (tmp_path / "3.damaged").is_dir()
