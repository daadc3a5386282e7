"""dfqlib: data-free quantization, reproducible from a notebook."""

__version__ = "0.1.0"
