"""Inferix: block-diffusion video world models, fast, long and interactive."""

__version__ = "0.1.0"

__all__ = ["World", "__version__"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import; `inferix --help` should not.
    if name == "World":
        from .world import World

        return World
    raise AttributeError(f"module 'inferix' has no attribute {name!r}")
