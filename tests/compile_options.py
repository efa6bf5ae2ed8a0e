"""How the suite compiles: quickly, and as users do where a proof is about the program that users run."""

import importlib.metadata

# JAX 0.11 took the switch away; its programs take as long as those of users.
CAN_SWITCH = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)

QUICK_FLAGS = ("--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1") + (
    ("--xla_cpu_use_fusion_emitters=false",) if CAN_SWITCH else ()
)

# The fusions of users' programs, for tests that read a compiled program; and their LLVM passes too, for tests of bits.
FUSED = {"xla_cpu_use_fusion_emitters": True} if CAN_SWITCH else {}
AS_USERS_DO = {"xla_backend_optimization_level": 3, **FUSED}
