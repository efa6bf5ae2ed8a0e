"""Make tests/parity/golden/memory_layers.npz with the released memory layers of arXiv 2412.09764.

    python tools/memory_goldens.py --memory CHECKOUT

Needs PyTorch and a checkout of facebookresearch/memory; its `HashingMemory` runs as it is, in float64 on the CPU. Only its
embedding bag, a GPU kernel, is stood in for by `torch.nn.EmbeddingBag`. Weights are random, inputs and outputs are kept.
"""

import argparse
import importlib
import pathlib
import sys
import types

import numpy as np
import torch

OUT = pathlib.Path(__file__).parent.parent / "tests" / "parity" / "golden" / "memory_layers.npz"
D, TOKENS = 24, 13
VARIANTS = {
    "plain": {"mem_v_dim": 10, "swilu_projection": False},
    "memory_plus": {"mem_v_dim": -1, "swilu_projection": True},
    "peer": {"mem_v_dim": -1, "swilu_projection": False, "peer_variant": True},
}


class Bag(torch.nn.EmbeddingBag):
    """A sum of rows with a weight each, as the released kernel computes it."""

    def __init__(self, size: int, dim: int):
        super().__init__(size, dim, mode="sum")

    def forward(self, indices: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return super().forward(indices, per_sample_weights=scores)


def released(checkout: pathlib.Path) -> types.ModuleType:
    """The module of the checkout, with a bag for its kernel's place."""
    package = types.ModuleType("released")
    package.__path__ = [str(checkout / "lingua" / "product_key")]
    stand_in = types.ModuleType("released.colwise_embedding_bag")
    stand_in.ColwiseEmbeddingBag, stand_in.xFormerEmbeddingBag = type("ColwiseEmbeddingBag", (), {}), Bag
    sys.modules |= {"released": package, "released.colwise_embedding_bag": stand_in}
    return importlib.import_module("released.memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=pathlib.Path, required=True, help="checkout of facebookresearch/memory")
    module = released(parser.parse_args().memory)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    kept: dict[str, np.ndarray] = {}
    for name, options in VARIANTS.items():
        module.HashingMemory.VALUES = None
        layer = module.HashingMemory(D, D, mem_k_dim=12, mem_heads=3, mem_knn=5, mem_n_keys=7, **options)
        layer.reset_parameters()
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.3)
        x = torch.randn(2, TOKENS, D, requires_grad=True)
        # The PEER path reshapes to v_dim and back; both are D here.
        y = layer.eval()(x)
        (y**2).sum().backward()
        kept |= {f"{name}/x": x, f"{name}/y": y, f"{name}/dx": x.grad}
        for key, parameter in layer.named_parameters():
            kept |= {f"{name}/weights/{key}": parameter, f"{name}/gradients/{key}": parameter.grad}
    arrays = {key: value.detach().numpy().astype(np.float32) for key, value in kept.items()}
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT.name}: {len(arrays)} arrays, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
