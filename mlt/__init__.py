"""mlt: long-context language models in JAX that prove what they do."""

__version__ = "0.1.0"
