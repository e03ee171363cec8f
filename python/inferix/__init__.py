"""Inferix: block-diffusion video world models, fast, long and interactive."""

__all__ = ["World", "__version__"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import; `inferix --help` should not.
    if name == "World":
        from .world import World

        return World
    if name == "__version__":
        from inferix_kernels import __version__

        return __version__
    raise AttributeError(f"module 'inferix' has no attribute {name!r}")
