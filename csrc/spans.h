// Spans of the profiler for Python: see spans.cpp, which like bindings.cpp knows Python.
#pragma once

struct _object;  // PyObject

namespace inferix {

// Adds the types Ring and Spans to a module. False: a Python exception is set.
bool define_spans(_object* module);

}  // namespace inferix
