"""Where our parameters lie in another library's tensors, said once and used in both directions.

A link names a tensor of theirs (or one per expert) and the parameters of ours that it holds side by side. Reading cuts,
permutes and reshapes; writing undoes each step. Values are moved, never computed, so a round trip is exact to the bit.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from mlt.errors import UserError

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our parameters inside a tensor of theirs.

    Attributes:
        ours: exported name of the parameter.
        size: how much of the link's axis it takes.
        order: permutation of the part's dims that brings them into our order; None keeps them.
        view: shape of the part before that permutation, where a dim is to be split; None keeps it.
    """

    ours: str
    size: int
    order: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Link:
    """A tensor of theirs and what it holds.

    Attributes:
        theirs: its name; several names are tensors stacked on a new leading dim (one per expert).
        shape: of each of them.
        parts: our parameters, in order along `axis`.
        view: shape of the (stacked) tensor in which the parts lie side by side; None means its own.
        axis: dim of that shape along which they do.
    """

    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    view: tuple[int, ...] | None = None
    axis: int = 0

    @property
    def stacked(self) -> tuple[int, ...]:
        return self.shape if len(self.theirs) == 1 else (len(self.theirs), *self.shape)

    @property
    def seen(self) -> tuple[int, ...]:
        return self.stacked if self.view is None else self.view

    def read(self, theirs: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) of our parameters."""
        arrays = [theirs[name] for name in self.theirs]
        whole = (arrays[0] if len(arrays) == 1 else np.stack(arrays)).reshape(self.seen)
        start = 0
        for part in self.parts:
            where = (*(slice(None),) * self.axis, slice(start, start + part.size))
            piece = whole[where] if part.view is None else whole[where].reshape(part.view)
            piece = piece if part.order is None else np.transpose(piece, part.order)
            start += part.size
            yield part.ours, np.ascontiguousarray(piece).reshape(shapes[part.ours])

    def write(self, ours: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) of their tensors."""
        pieces = []
        for part in self.parts:
            shape = tuple(part.size if axis == self.axis else size for axis, size in enumerate(self.seen))
            if part.order is None:
                pieces.append(ours[part.ours].reshape(shape))
            else:
                view = part.view or shape
                permuted = ours[part.ours].reshape(tuple(view[axis] for axis in part.order))
                pieces.append(np.transpose(permuted, np.argsort(part.order)).reshape(shape))
        whole = np.ascontiguousarray(np.concatenate(pieces, axis=self.axis)).reshape(self.stacked)
        yield from zip(self.theirs, [whole] if len(self.theirs) == 1 else whole, strict=True)


def vector(ours: str, theirs: str, *shape: int) -> Link:
    """A tensor that lies as ours does, up to its shape."""
    return Link((theirs,), shape, (Part(ours, shape[0]),))


def linear(ours: str, theirs: str, outputs: int, inputs: int) -> Link:
    """A torch linear weight (out, in); ours is (in..., out...)."""
    return fused_linear(theirs, inputs, ((ours, outputs),))


def fused_linear(theirs: str, inputs: int, parts: Iterable[tuple[str, int]]) -> Link:
    """A torch linear weight whose rows are several projections of ours, one below the other."""
    parts = tuple(Part(ours, size, (1, 0)) for ours, size in parts)
    return Link((theirs,), (sum(part.size for part in parts), inputs), parts)


def fused_vector(theirs: str, parts: Iterable[tuple[str, int]]) -> Link:
    parts = tuple(Part(ours, size) for ours, size in parts)
    return Link((theirs,), (sum(part.size for part in parts),), parts)


def depthwise_conv(theirs: str, width: int, parts: Iterable[tuple[str, int]]) -> Link:
    """A torch depthwise convolution (channels, 1, width) over several of our convolutions (width, channels...)."""
    parts = tuple(Part(ours, size, (2, 1, 0)) for ours, size in parts)
    return Link((theirs,), (sum(part.size for part in parts), 1, width), parts)


def read_all(
    links: Iterable[Link], theirs: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], where: str
) -> Tensors:
    """Our tensors from theirs.

    Raises:
        UserError: a tensor is missing, is left over, or has another shape; all of them are listed.
    """
    links = list(links)
    wanted = {name: link.shape for link in links for name in link.theirs}
    missing = sorted(set(wanted) - set(theirs))
    over = sorted(set(theirs) - set(wanted))
    odd = [name for name in wanted if name in theirs and theirs[name].shape != wanted[name]]
    lines = [f"  missing   {name} {wanted[name]}" for name in missing]
    lines += [f"  unknown   {name} {theirs[name].shape}" for name in over]
    lines += [f"  shape     {name} is {theirs[name].shape}, its config says {wanted[name]}" for name in odd]
    if lines:
        more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise UserError(f"{where}: tensors do not fit the architecture of its config.json:\n" + "\n".join(lines[:20] + more))
    ours = {name: array for link in links for name, array in link.read(theirs, shapes)}
    if ours.keys() != shapes.keys():
        raise RuntimeError(f"{where}: no tensor is linked to {sorted(shapes.keys() ^ ours.keys())}; please report this")
    return ours


def write_all(links: Iterable[Link], ours: Mapping[str, np.ndarray]) -> Tensors:
    """Their tensors from ours."""
    links = list(links)
    left = set(ours) - {part.ours for link in links for part in link.parts}
    if left:
        raise RuntimeError(f"no tensor is linked to {sorted(left)}; please report this")
    return {name: np.ascontiguousarray(array) for link in links for name, array in link.write(ours)}
