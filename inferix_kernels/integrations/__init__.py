"""The kernels under other libraries' signatures, one module a library. None of those libraries is imported by
importing this package, and none needs to be installed to call its functions here.

A module takes tensors as its library lays them out and reads them where they lie: a cache is never copied. What we do
not have is Unsupported, by the library's own name of the argument; nothing is ignored in silence.
"""
