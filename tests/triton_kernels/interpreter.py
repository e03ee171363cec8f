"""Triton's interpreter without what it does over and over: the same results, sooner.

When a kernel is launched, the interpreter exchanges the functions of `triton.language` for its own, and it looks
through the whole language for them again at each call of a function inside the kernel, tl.sum and tl.zeros among them
(`_patch_lang` in triton/runtime/interpreter.py). Nothing is left to exchange then, and the search takes half of a
kernel's time.
"""

import contextlib
import functools
from collections.abc import Iterator

import triton.language as tl
from triton.runtime import interpreter


@contextlib.contextmanager
def patched_once_a_launch() -> Iterator[None]:
    """Inside, the language is exchanged when a kernel is launched, and put back when it has ended."""
    original, exchanged = interpreter._patch_lang, set()

    @functools.cache
    def languages(function) -> frozenset[str]:
        """The modules in which `_patch_lang` exchanges functions for this one."""
        return frozenset(m.__name__ for m in function.__globals__.values() if m is tl or m is tl.core)

    def patch(function):
        if languages(function) <= exchanged:
            return interpreter._LangPatchScope()  # of no changes
        scope = original(function)
        exchanged.update(languages(function))
        restore = scope.restore

        def restore_all():
            exchanged.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch
    try:
        yield
    finally:
        interpreter._patch_lang = original
