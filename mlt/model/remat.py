"""Memory policy of a run: which named tensors are saved, offloaded to host memory, or recomputed in the backward pass.

It is run policy, not model config: the same model trains under any of them, with equal gradients.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from mlt.config.base import Config
from mlt.config.problems import Problem, suggest
from mlt.mixers.base import SAVE_POINTS


class Remat(Config):
    """What the backward pass keeps.

    Attributes:
        mode: "none" keeps every intermediate; "sub_layer" keeps each sub-layer's input and what is named below, and
            recomputes the rest one sub-layer at a time.
        save: save points kept on the device.
        offload: save points moved to pinned host memory and back. Save points in neither list are recomputed.
    """

    mode: Literal["none", "sub_layer"] = "sub_layer"
    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()

    def problems(self) -> Iterator[Problem]:
        for field in ("save", "offload"):
            for i, name in enumerate(getattr(self, field)):
                if name not in SAVE_POINTS:
                    choices = suggest(name, SAVE_POINTS, choices="the save points are", list_all=True)
                    yield Problem(f"{field}[{i}]", name, "is not a save point", choices)
        for name in set(self.save) & set(self.offload):
            yield Problem("offload", name, "is in both save and offload", "name it in one of them")
        if self.mode == "none" and (self.save or self.offload):
            yield Problem("mode", self.mode, "keeps everything, so save and offload have no effect", 'use mode="sub_layer"')

    def describe(self) -> list[str]:
        """One line per save point, for the plan."""
        if self.mode == "none":
            return ["every intermediate is saved on the device"]
        fate = dict.fromkeys(SAVE_POINTS, "recompute") | {"sub_layer_in": "save", "published": "save"}
        fate |= dict.fromkeys(self.save, "save") | dict.fromkeys(self.offload, "offload to pinned host")
        return [f"{name}: {what}" for name, what in fate.items()]

    def apply(self, fn: Callable[..., Any], *, in_loop: bool) -> Callable[..., Any]:
        """`fn` with this policy on its backward pass.

        Args:
            fn: a pure function.
            in_loop: it runs in the body of a scan of more than one round. Anywhere else the compiler would find the
                recomputation equal to the first computation and keep that, so it is hidden from it.
        """
        if self.mode == "none":
            return fn
        if self.offload:
            policy = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=list(self.save),
                names_which_can_be_offloaded=list(self.offload),
                offload_src="device",
                offload_dst="pinned_host",
            )
        else:
            policy = jax.checkpoint_policies.save_only_these_names(*self.save)
        return jax.checkpoint(fn, policy=policy, prevent_cse=not in_loop)
