"""Adam on whole tables with settings of their own, each owner on its shard."""

from typing import ClassVar

from mlt.optim.lazy_adam import LazyAdam


class DenseAdam(LazyAdam):
    """Exact Adam: moments of every row decay at every step, read or not. The gradient is dense, and so is weight decay."""

    lazy: ClassVar[bool] = False
