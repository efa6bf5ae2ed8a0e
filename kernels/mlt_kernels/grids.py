"""What a grid of programs can hold."""

MOST_ROWS = 65535
"""Programs along the second and third dim of a CUDA grid, where kernels have the rows of a batch."""


def unsupported_shape(name: str, shape: tuple[int, ...]) -> str | None:
    """Why no CUDA grid can be made for an argument (B, ...) of this name and shape, or None."""
    if 0 in shape:
        return f"{name} has shape {shape}: nothing to compute"
    return f"{name} has {shape[0]} rows; a grid holds {MOST_ROWS}" if shape[0] > MOST_ROWS else None
