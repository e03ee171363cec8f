// inferix_kernels._spans: the profiler's spans and numbers, at the price of a few pointers. inferix_kernels/profile.py
// says what they mean and does all that is not the common case; inferix_kernels/_ring.py is Ring in Python, and says
// what it does.
//
// Plain CPython types, as the way through pybind11 costs as much as a span. A span begins and ends beside operations that
// leave nothing of it in the caches, so what counts is how much memory it touches: it allocates nothing, calls little,
// and hands its references on. The GIL guards all of it. Long because such types are tables.
#include <Python.h>
#include <structmember.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <vector>

namespace {

enum Level { kOff, kBlock, kLayer };  // as in profile.py
constexpr Py_ssize_t kDeepest = 64;  // spans within each other whose own times are told apart, as in _ring.py

// A span that has ended.
struct Row {
  PyObject* name;
  PyObject* args;  // a dict; null: none
  double start, end;
  Py_ssize_t depth;
};

struct Span;

// The spans of one thread.
struct Ring {
  PyObject_HEAD
  PyObject** open;  // the innermost last
  Py_ssize_t depth, room;
  PyObject* gpu;  // what times them on a GPU as well; None: nothing
  PyObject *counts, *values;  // dicts: what was counted on this thread, and its metrics
  unsigned long thread;
  long long count, added, mask;  // spans that ended; those of them that are summed up; the capacity - 1
  Row* rows;
  Span* spare[kDeepest];  // one for each depth, used again; null before the first
  double within[kDeepest + 2], since[kDeepest + 2];
};

struct Spans {
  PyObject_HEAD
  PyObject* misplaced;
  PyObject* clock;  // None: the system's, which is time.perf_counter's on Linux
  int level;  // a Level
  int annotated;  // spans are the reference's
};

// A function of profile.py: what is not the common case is the reference's, errors included.
struct Function {
  PyObject_HEAD
  PyObject* attributes;  // __doc__ and the like
  Spans* spans;
  PyObject* reference;
  vectorcallfunc call;
};

// What `span` gives, and `timed`.
struct Span {
  PyObject_HEAD
  Spans* spans;
  Ring* ring;  // null once it has ended
  PyObject* name;
  PyObject* args;  // null: none, or it has ended
  double start, end;
  bool measured;  // it is under way, and not recorded
  vectorcallfunc call;  // ends it
};

PyTypeObject *ring_type, *span_type, *timed_type, *spans_type;
PyTypeObject* sum_type;  // _ring.Sum
PyObject* nothing;  // a span that is not recorded
// Of this thread. Borrowed: every ring that is freed, and every recording that begins, makes them void, by the number.
thread_local Ring* current;
thread_local uint64_t current_of;
uint64_t valid = 1;

template <typename To>
To* as(PyObject* object) {
  return reinterpret_cast<To*>(object);
}

PyObject* object(void* any) { return static_cast<PyObject*>(any); }

// What a type tells the collector of cycles, and how its objects end.
template <typename... Held>
int visit_all(visitproc visit, void* arg, Held*... held) {
  int result = 0;
  ((result = result || !held ? result : visit(object(held), arg)), ...);
  return result;
}

template <typename Held>
void clear(Held*& held) {
  Py_CLEAR(held);
}

template <typename Held>
void replace(Held*& old, Held* made) {
  Held* const gone = old;
  old = made;
  Py_XDECREF(gone);
}

template <inquiry kClear>
void dealloc(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  kClear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

template <typename Function>
PyCFunction fast(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// A new reference, also of what is no PyObject* here.
template <typename Held>
Held* held(Held* what) {
  Py_INCREF(what);
  return what;
}

bool read_clock(const Spans* spans, double& now) {
  if (spans->clock == Py_None) {
    timespec read;
    clock_gettime(CLOCK_MONOTONIC, &read);
    now = static_cast<double>(read.tv_sec * 1'000'000'000LL + read.tv_nsec) / 1e9;
    return true;
  }
  PyObject* const given = spans->clock ? PyObject_CallNoArgs(spans->clock) : nullptr;
  if (!given && !PyErr_Occurred()) PyErr_SetString(PyExc_AttributeError, "clock was deleted");
  if (!given) return false;
  now = PyFloat_AsDouble(given);
  Py_DECREF(given);
  return now != -1.0 || !PyErr_Occurred();
}

// Ring

// Over the oldest one. The references are the ring's then.
void write(Ring* ring, const Row& made) {
  Row& row = ring->rows[ring->count & ring->mask];
  const Row old = row;
  row = made;
  ++ring->count;
  Py_XDECREF(old.name), Py_XDECREF(old.args);  // last, as this may run Python
}

PyObject* ring_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"capacity", "thread", nullptr};
  long long capacity;
  unsigned long thread;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Lk", const_cast<char**>(names), &capacity, &thread)) return nullptr;
  if (capacity < 1 || (capacity & (capacity - 1)))
    return PyErr_Format(PyExc_ValueError, "capacity must be a power of two, got %lld", capacity);
  Ring* const ring = as<Ring>(type->tp_alloc(type, 0));  // of zeros
  if (!ring) return nullptr;
  ring->thread = thread, ring->mask = capacity - 1;
  ring->rows = static_cast<Row*>(PyMem_Calloc(capacity, sizeof(Row)));
  ring->gpu = held(Py_None), ring->counts = PyDict_New(), ring->values = PyDict_New();
  if (!ring->rows || !ring->counts || !ring->values) return Py_DECREF(ring), PyErr_NoMemory();
  return object(ring);
}

bool push(Ring* ring, PyObject* span) {
  if (ring->depth == ring->room) {
    const Py_ssize_t room = ring->room ? 2 * ring->room : kDeepest;
    void* const moved = PyMem_Realloc(ring->open, room * sizeof(PyObject*));
    if (!moved) return PyErr_NoMemory(), false;
    ring->open = static_cast<PyObject**>(moved), ring->room = room;
  }
  ring->open[ring->depth++] = held(span);
  return true;
}

PyObject* ring_push(PyObject* self, PyObject* span) { return push(as<Ring>(self), span) ? held(Py_None) : nullptr; }

PyObject* ring_pop(PyObject* self, PyObject*) {
  Ring* const ring = as<Ring>(self);
  if (!ring->depth) return PyErr_SetString(PyExc_IndexError, "no span is open"), nullptr;
  return ring->open[--ring->depth];
}

PyObject* ring_remove(PyObject* self, PyObject* span) {
  Ring* const ring = as<Ring>(self);
  PyObject** const end = ring->open + ring->depth;
  PyObject** const found = std::find(ring->open, end, span);
  if (found == end) return PyErr_SetString(PyExc_ValueError, "the span is not open"), nullptr;
  std::copy(found + 1, end, found), --ring->depth;
  Py_DECREF(span);
  Py_RETURN_NONE;
}

PyObject* ring_open(PyObject* self, void*) {
  const Ring* const ring = as<Ring>(self);
  PyObject* const list = PyList_New(0);
  for (Py_ssize_t i = 0; list && i < ring->depth; ++i)
    if (PyList_Append(list, ring->open[i])) return Py_DECREF(list), nullptr;
  return list;
}

// The rows, counts and values hold texts and numbers, which are part of no cycle.
int ring_traverse(PyObject* self, visitproc visit, void* arg) {
  Ring* const ring = as<Ring>(self);
  for (Span* spare : ring->spare)
    if (const int result = visit_all(visit, arg, spare)) return result;
  for (Py_ssize_t i = 0; i < ring->depth; ++i)
    if (const int result = visit_all(visit, arg, ring->open[i])) return result;
  return visit_all(visit, arg, Py_TYPE(self), ring->gpu);
}

int ring_clear(PyObject* self) {
  Ring* const ring = as<Ring>(self);
  ++valid;
  clear(ring->gpu);
  for (Span*& spare : ring->spare) clear(spare);
  while (ring->depth) Py_DECREF(ring->open[--ring->depth]);
  return 0;
}

int ring_end(PyObject* self) {
  Ring* const ring = as<Ring>(self);
  ring_clear(self);
  for (long long i = 0; ring->rows && i < std::min(ring->count, ring->mask + 1); ++i)
    Py_XDECREF(ring->rows[i].name), Py_XDECREF(ring->rows[i].args);
  PyMem_Free(ring->rows), PyMem_Free(ring->open);
  clear(ring->counts), clear(ring->values);
  return 0;
}

PyObject* ring_write(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  if (count != 5) return PyErr_SetString(PyExc_TypeError, "write takes name, start, end, depth, args"), nullptr;
  const double start = PyFloat_AsDouble(given[1]), end = PyFloat_AsDouble(given[2]);
  const Py_ssize_t depth = PyLong_AsSsize_t(given[3]);
  if (PyErr_Occurred()) return nullptr;
  if (!PyUnicode_Check(given[0]) || !PyDict_Check(given[4]) || depth < 0)
    return PyErr_SetString(PyExc_TypeError, "name must be a str, depth not negative, args a dict"), nullptr;
  PyObject* const name = PyUnicode_FromObject(given[0]);  // of no subclass, whose hash may be anything
  if (!name) return nullptr;
  write(as<Ring>(self), {name, held(given[4]), start, end, depth});
  Py_RETURN_NONE;
}

PyObject* ring_kept(PyObject* self, PyObject*) {
  const Ring* const ring = as<Ring>(self);
  PyObject* const found = PyList_New(0);
  const long long last = ring->count;
  for (long long i = std::max(0LL, last - ring->mask - 1); found && i < last; ++i) {
    const Row row = ring->rows[i & ring->mask];
    Py_INCREF(row.name), Py_XINCREF(row.args);  // at once: what is made below may run Python, which may write here
    PyObject* const args = row.args ? row.args : PyDict_New();
    PyObject* const made = Py_BuildValue("NddnN", row.name, row.start, row.end, row.depth, args);
    const bool kept = made && PyList_Append(found, made) == 0;
    Py_XDECREF(made);
    if (!kept) return Py_DECREF(found), nullptr;
  }
  return found;
}

struct Sum {
  PyObject* name;  // borrowed from the dict of indices
  double own, seconds;
  long long number;
};

// The sum of this name, by its index. Null: a Python exception is set.
Sum* sum_of(PyObject* name, PyObject* indices, std::vector<Sum>& sums) {
  if (PyObject* const index = PyDict_GetItemWithError(indices, name)) return &sums[PyLong_AsSsize_t(index)];
  if (PyErr_Occurred()) return nullptr;
  PyObject* const index = PyLong_FromSize_t(sums.size());
  const bool kept = index && PyDict_SetItem(indices, name, index) == 0;
  Py_XDECREF(index);
  if (!kept) return nullptr;
  sums.push_back({name, 0.0, 0.0, 0});
  return &sums.back();
}

PyObject* ring_take(PyObject* self, PyObject*) {
  Ring* const ring = as<Ring>(self);
  const long long last = ring->count, first = std::max(ring->added, last - ring->mask - 1);
  const long long missed = first - ring->added;
  ring->added = last;
  PyObject* const indices = PyDict_New();  // becomes the sums
  std::vector<Sum> sums;
  PyObject* began = nullptr;
  for (long long i = first; indices && i < last; ++i) {
    const Row row = ring->rows[i & ring->mask];
    Sum* const sum = sum_of(row.name, indices, sums);
    if (!sum || (!began && row.depth == 0 && !(began = PyFloat_FromDouble(row.start))))
      return Py_DECREF(indices), Py_XDECREF(began), nullptr;
    const Py_ssize_t depth = std::min(row.depth, kDeepest);
    const double seconds = row.end - row.start;
    double& inner = ring->within[depth + 1];
    sum->own += ring->since[depth + 1] >= row.start ? seconds - inner : seconds;  // else: what was around is lost
    inner = 0.0;
    if (ring->within[depth] == 0.0) ring->since[depth] = row.start;
    ring->within[depth] += seconds, sum->seconds += seconds, ++sum->number;
  }
  for (const Sum& sum : sums) {
    PyObject* const given = Py_BuildValue("((ddL))", sum.own, sum.seconds, sum.number);
    PyObject* const made = given ? PyTuple_Type.tp_new(sum_type, given, nullptr) : nullptr;  // as Sum._make does
    Py_XDECREF(given);
    const bool kept = made && PyDict_SetItem(indices, sum.name, made) == 0;
    Py_XDECREF(made);
    if (!kept) return Py_DECREF(indices), Py_XDECREF(began), nullptr;
  }
  if (!began) began = held(Py_None);
  return Py_BuildValue("NLN", indices, missed, began);
}

PyMethodDef kRingMethods[] = {{"write", fast(ring_write), METH_FASTCALL, nullptr},
                              {"kept", ring_kept, METH_NOARGS, nullptr},
                              {"take", ring_take, METH_NOARGS, nullptr},
                              {"push", ring_push, METH_O, nullptr},
                              {"pop", ring_pop, METH_NOARGS, nullptr},
                              {"remove", ring_remove, METH_O, nullptr},
                              {nullptr, nullptr, 0, nullptr}};

PyMemberDef kRingMembers[] = {
    {"count", T_LONGLONG, offsetof(Ring, count), READONLY, nullptr},
    {"gpu", T_OBJECT, offsetof(Ring, gpu), 0, nullptr},
    {"counts", T_OBJECT, offsetof(Ring, counts), READONLY, nullptr},
    {"values", T_OBJECT, offsetof(Ring, values), READONLY, nullptr},
    {"depth", T_PYSSIZET, offsetof(Ring, depth), READONLY, nullptr},
    {"thread", T_ULONG, offsetof(Ring, thread), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};

PyGetSetDef kRingGetSet[] = {{"open", ring_open, nullptr, nullptr, nullptr},
                             {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot kRingSlots[] = {{Py_tp_new, reinterpret_cast<void*>(ring_new)},
                            {Py_tp_dealloc, reinterpret_cast<void*>(dealloc<ring_end>)},
                            {Py_tp_traverse, reinterpret_cast<void*>(ring_traverse)},
                            {Py_tp_clear, reinterpret_cast<void*>(ring_clear)},
                            {Py_tp_methods, kRingMethods},
                            {Py_tp_members, kRingMembers},
                            {Py_tp_getset, kRingGetSet},
                            {Py_tp_doc, const_cast<char*>("As _ring.py has it.")},
                            {0, nullptr}};
PyType_Spec kRing = {"inferix_kernels._spans.Ring", sizeof(Ring), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                     kRingSlots};

// Span and Timed: what `with` is given

// The common way to end: it is the innermost one that is open, of this thread.
bool is_innermost(const Span* span) {
  const Ring* const ring = span->ring;
  return ring && ring->depth && as<Span>(ring->open[ring->depth - 1]) == span &&
         ring->thread == PyThread_get_thread_ident();
}

// Its __exit__, of any arguments: a span is that itself, as another object would have to be made.
PyObject* span_exit(PyObject* self, PyObject* const*, size_t, PyObject*) {
  Span* const span = as<Span>(self);
  double end;
  if (!read_clock(span->spans, end)) return nullptr;
  span->end = end;
  if (span->measured) return span->measured = false, held(Py_None);
  if (!is_innermost(span)) {  // a mistake: said, and mended if it is an open one
    PyObject* const ring = span->ring ? object(span->ring) : Py_None;
    PyObject* const said = PyObject_CallFunctionObjArgs(span->spans->misplaced, self, ring, nullptr);
    if (!said) return nullptr;
    Py_DECREF(said);
    if (!is_innermost(span)) return clear(span->ring), held(Py_None);
  }
  Ring* const ring = span->ring;
  const Row row = {held(span->name), span->args, span->start, end, --ring->depth};
  span->args = nullptr, span->ring = nullptr;
  write(ring, row);
  Py_DECREF(ring), Py_DECREF(self);  // the ring's reference to it; the caller has one
  Py_RETURN_NONE;
}

// Of the type, which has no span at hand.
PyObject* exit_of(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (!count || (Py_TYPE(given[0]) != span_type && Py_TYPE(given[0]) != timed_type))
    return PyErr_SetString(PyExc_TypeError, "__exit__ is that of a span"), nullptr;
  return span_exit(given[0], nullptr, 0, nullptr);
}
PyMethodDef kExitOf = {"__exit__", fast(exit_of), METH_FASTCALL, nullptr};

PyObject* exit_get(PyObject*, PyObject* span, PyObject*) {
  return span ? held(span) : PyCFunction_New(&kExitOf, nullptr);
}
PyType_Slot kExitSlots[] = {{Py_tp_descr_get, reinterpret_cast<void*>(exit_get)}, {0, nullptr}};
PyType_Spec kSpanExit = {"inferix_kernels._spans.Exit", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT, kExitSlots};

int span_traverse(PyObject* self, visitproc visit, void* arg) {
  return visit_all(visit, arg, Py_TYPE(self), as<Span>(self)->spans, as<Span>(self)->ring);
}

int span_clear(PyObject* self) {
  clear(as<Span>(self)->ring);
  return 0;
}

int span_end(PyObject* self) {
  Span* const span = as<Span>(self);
  clear(span->spans), clear(span->ring), clear(span->name), clear(span->args);
  return 0;
}

// What `with` calls and nobody needs. A function in a type is no method: it is not bound, which would make an object.
PyObject* ignore(PyObject*, PyObject* const*, Py_ssize_t) { Py_RETURN_NONE; }
PyMethodDef kEnter = {"__enter__", fast(ignore), METH_FASTCALL, nullptr};
PyMethodDef kExit = {"__exit__", fast(ignore), METH_FASTCALL, nullptr};

PyObject* timed_enter(PyObject* self, PyObject*) { return held(self); }
PyMethodDef kTimedMethods[] = {{"__enter__", timed_enter, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyObject* timed_seconds(PyObject* self, void*) {
  const Span* const span = as<Span>(self);
  if (span->ring || span->measured) return PyErr_SetString(PyExc_AttributeError, "end"), nullptr;  // as of a slot
  return PyFloat_FromDouble(span->end - span->start);
}
PyGetSetDef kTimedGetSet[] = {{"seconds", timed_seconds, nullptr, nullptr, nullptr},
                              {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyMemberDef kTimedMembers[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Span, call), READONLY, nullptr},
                               {"name", T_OBJECT, offsetof(Span, name), READONLY, nullptr},
                               {"ring", T_OBJECT, offsetof(Span, ring), READONLY, nullptr},
                               {"start", T_DOUBLE, offsetof(Span, start), READONLY, nullptr},
                               {"end", T_DOUBLE, offsetof(Span, end), READONLY, nullptr},
                               {nullptr, 0, 0, 0, nullptr}};

PyMemberDef kSpanMembers[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Span, call), READONLY, nullptr},
                              {"name", T_OBJECT, offsetof(Span, name), READONLY, nullptr},
                              {nullptr, 0, 0, 0, nullptr}};

PyType_Slot kSpanSlots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(dealloc<span_end>)},
                            {Py_tp_traverse, reinterpret_cast<void*>(span_traverse)},
                            {Py_tp_clear, reinterpret_cast<void*>(span_clear)},
                            {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                            {Py_tp_members, kSpanMembers},
                            {0, nullptr}};
PyType_Spec kSpan = {"inferix_kernels._spans.Span", sizeof(Span), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                         Py_TPFLAGS_DISALLOW_INSTANTIATION,
                     kSpanSlots};

PyType_Slot kTimedSlots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(dealloc<span_end>)},
                             {Py_tp_traverse, reinterpret_cast<void*>(span_traverse)},
                             {Py_tp_clear, reinterpret_cast<void*>(span_clear)},
                             {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                             {Py_tp_methods, kTimedMethods},
                             {Py_tp_members, kTimedMembers},
                             {Py_tp_getset, kTimedGetSet},
                             {0, nullptr}};
PyType_Spec kTimed = {"inferix_kernels._spans.Timed", sizeof(Span), 0, kSpan.flags, kTimedSlots};

// Function: what makes them, and numbers

// Whether a GPU times the spans of this block, too; -1: a Python exception is set.
int on_gpu(const Ring* ring) {
  if (!ring->gpu || ring->gpu == Py_None) return 0;
  static PyObject* const name = PyUnicode_InternFromString("active");
  PyObject* const active = PyObject_GetAttr(ring->gpu, name);
  if (!active) return -1;
  const int is = PyObject_IsTrue(active);
  Py_DECREF(active);
  return is;
}

// Arguments as a dict, if all are numbers and texts; null without an exception: they are not.
PyObject* plain(PyObject* const* values, PyObject* names) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i) {
    PyObject* const value = values[i];
    if (!PyLong_CheckExact(value) && !PyUnicode_CheckExact(value) && !PyFloat_CheckExact(value) && !PyBool_Check(value))
      return nullptr;
    PyObject* const name = PyTuple_GET_ITEM(names, i);  // one of these is no argument of the span
    if (!PyUnicode_CompareWithASCIIString(name, "name") || !PyUnicode_CompareWithASCIIString(name, "device")) return nullptr;
  }
  PyObject* const made = PyDict_New();
  for (Py_ssize_t i = 0; made && i < PyTuple_GET_SIZE(names); ++i)
    if (PyDict_SetItem(made, PyTuple_GET_ITEM(names, i), values[i])) return Py_DECREF(made), nullptr;
  return made;
}

Span* new_span(PyTypeObject* type, Spans* spans) {
  Span* const made = as<Span>(type->tp_alloc(type, 0));
  if (made) made->spans = held(spans), made->call = span_exit;
  return made;
}

// The one of this depth, if nobody has it any more, or a new one. A new reference; null: a Python exception is set.
Span* take_span(Spans* spans, Ring* ring) {
  Span** const spare = ring->depth < kDeepest ? &ring->spare[ring->depth] : nullptr;
  if (spare && *spare && Py_REFCNT(*spare) == 1) return held(*spare);
  Span* const made = new_span(span_type, spans);
  if (made && spare) replace(*spare, held(made));
  return made;
}

// It begins. Takes the references; null: a Python exception is set.
PyObject* begun(Span* span, Ring* ring, PyObject* name, PyObject* args) {
  replace(span->ring, ring), replace(span->name, held(name)), replace(span->args, args);
  if (!read_clock(span->spans, span->start) || (ring && !push(ring, object(span)))) return Py_DECREF(span), nullptr;
  return object(span);
}

PyObject* referred(PyObject* self, PyObject* const* given, size_t count, PyObject* names) {
  return PyErr_Occurred() ? nullptr : PyObject_Vectorcall(as<Function>(self)->reference, given, count, names);
}

// span(name, **args)
PyObject* call_span(PyObject* self, PyObject* const* given, size_t count, PyObject* names) {
  Spans* const spans = as<Function>(self)->spans;
  const bool common = PyVectorcall_NARGS(count) == 1 && PyUnicode_CheckExact(given[0]);
  if (common && spans->level < kLayer) return held(nothing);
  PyObject* const args = common && names ? plain(given + 1, names) : nullptr;
  const bool here = common && !spans->annotated && current_of == valid && (args || !names) && !PyErr_Occurred();
  Ring* const ring = here ? held(current) : nullptr;
  const int timed_there = here ? on_gpu(ring) : 0;
  Span* const span = here && !timed_there ? take_span(spans, ring) : nullptr;
  if (span) return begun(span, ring, given[0], args);
  Py_XDECREF(args), Py_XDECREF(ring);
  return referred(self, given, count, names);
}

// timed(name, device, **args)
PyObject* call_timed(PyObject* self, PyObject* const* given, size_t count, PyObject* names) {
  Spans* const spans = as<Function>(self)->spans;
  const Py_ssize_t number = PyVectorcall_NARGS(count);
  const bool common = (number == 1 || (number == 2 && given[1] == Py_None)) && PyUnicode_CheckExact(given[0]);
  const bool recorded = spans->level != kOff;
  const bool here = common && (!recorded || (current_of == valid && current->gpu == Py_None));
  PyObject* const args = here && names ? plain(given + number, names) : nullptr;
  if (!here || (names && !args)) return referred(self, given, count, names);
  Span* const made = new_span(timed_type, spans);
  if (!made) return Py_XDECREF(args), nullptr;
  made->measured = !recorded;
  return begun(made, recorded ? held(current) : nullptr, given[0], args);
}

// A number that a float can hold.
bool is_number(PyObject* given) {
  int overflow = 0;
  if (PyLong_CheckExact(given)) return PyLong_AsLongLongAndOverflow(given, &overflow), !overflow;
  return PyFloat_CheckExact(given) && std::isfinite(PyFloat_AS_DOUBLE(given));
}

// count(name, amount) and metric(name, value), of a name that this thread has given before.
template <bool kAdds>
PyObject* call_number(PyObject* self, PyObject* const* given, size_t count, PyObject* names) {
  const bool two = !names && PyVectorcall_NARGS(count) == 2;
  if (two && as<Function>(self)->spans->level == kOff) Py_RETURN_NONE;
  if (!two || current_of != valid || !PyUnicode_CheckExact(given[0]) || !is_number(given[1]))
    return referred(self, given, count, names);
  PyObject* const numbers = kAdds ? current->counts : current->values;
  PyObject* const old = PyDict_GetItemWithError(numbers, given[0]);
  if (!old) return referred(self, given, count, names);
  PyObject* const now = kAdds ? PyNumber_Add(old, given[1]) : held(given[1]);
  const bool kept = now && PyDict_SetItem(numbers, given[0], now) == 0;
  Py_XDECREF(now);
  return kept ? held(Py_None) : nullptr;
}

PyObject* function_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"spans", "kind", "reference", nullptr};
  PyObject *spans, *reference;
  const char* kind;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!sO", const_cast<char**>(names), spans_type, &spans, &kind,
                                   &reference))
    return nullptr;
  const std::string_view wanted = kind;
  const vectorcallfunc call = wanted == "span"     ? call_span
                              : wanted == "timed"  ? call_timed
                              : wanted == "count"  ? call_number<true>
                              : wanted == "metric" ? call_number<false>
                                                   : nullptr;
  if (!call) return PyErr_Format(PyExc_ValueError, "kind must be span, timed, count or metric, got %s", kind);
  Function* const made = as<Function>(type->tp_alloc(type, 0));
  if (!made) return nullptr;
  made->spans = held(as<Spans>(spans)), made->reference = held(reference), made->call = call;
  return object(made);
}

int function_traverse(PyObject* self, visitproc visit, void* arg) {
  const Function* const function = as<Function>(self);
  return visit_all(visit, arg, Py_TYPE(self), function->attributes, function->spans, function->reference);
}

int function_clear(PyObject* self) {
  Function* const function = as<Function>(self);
  clear(function->attributes), clear(function->spans), clear(function->reference);
  return 0;
}

// As of a static method. What has one is a routine to inspect, and so to what writes documentation.
PyObject* function_get(PyObject* self, PyObject*, PyObject*) { return held(self); }

PyMemberDef kFunctionMembers[] = {{"__dictoffset__", T_PYSSIZET, offsetof(Function, attributes), READONLY, nullptr},
                                  {"__vectorcalloffset__", T_PYSSIZET, offsetof(Function, call), READONLY, nullptr},
                                  {nullptr, 0, 0, 0, nullptr}};

PyGetSetDef kFunctionGetSet[] = {{"__dict__", PyObject_GenericGetDict, nullptr, nullptr, nullptr},
                                 {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot kFunctionSlots[] = {{Py_tp_new, reinterpret_cast<void*>(function_new)},
                                {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                                {Py_tp_descr_get, reinterpret_cast<void*>(function_get)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(dealloc<function_clear>)},
                                {Py_tp_traverse, reinterpret_cast<void*>(function_traverse)},
                                {Py_tp_clear, reinterpret_cast<void*>(function_clear)},
                                {Py_tp_members, kFunctionMembers},
                                {Py_tp_getset, kFunctionGetSet},
                                {0, nullptr}};
PyType_Spec kFunction = {"inferix_kernels._spans.Function", sizeof(Function), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, kFunctionSlots};

// Spans: what the functions share

PyObject* spans_number(PyObject*, PyObject*) { return PyLong_FromUnsignedLongLong(valid); }

PyObject* spans_adopt(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 2 || Py_TYPE(given[0]) != ring_type)
    return PyErr_SetString(PyExc_TypeError, "adopt takes a Ring and a number"), nullptr;
  const uint64_t number = PyLong_AsUnsignedLongLong(given[1]);
  if (PyErr_Occurred()) return nullptr;
  current = as<Ring>(given[0]), current_of = number;
  Py_RETURN_NONE;
}

PyObject* spans_forget(PyObject*, PyObject*) {
  ++valid;
  Py_RETURN_NONE;
}

PyObject* spans_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"misplaced", "clock", nullptr};
  PyObject *misplaced, *clock;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", const_cast<char**>(names), &misplaced, &clock)) return nullptr;
  Spans* const spans = as<Spans>(type->tp_alloc(type, 0));
  if (!spans) return nullptr;
  spans->misplaced = held(misplaced), spans->clock = held(clock);
  return object(spans);
}

int spans_traverse(PyObject* self, visitproc visit, void* arg) {
  return visit_all(visit, arg, Py_TYPE(self), as<Spans>(self)->misplaced, as<Spans>(self)->clock);
}

int spans_clear(PyObject* self) {
  clear(as<Spans>(self)->misplaced), clear(as<Spans>(self)->clock);
  return 0;
}

PyMethodDef kSpansMethods[] = {{"adopt", fast(spans_adopt), METH_FASTCALL, nullptr},
                               {"number", spans_number, METH_NOARGS, nullptr},
                               {"forget", spans_forget, METH_NOARGS, nullptr},
                               {nullptr, nullptr, 0, nullptr}};

PyMemberDef kSpansMembers[] = {{"clock", T_OBJECT, offsetof(Spans, clock), 0, nullptr},
                               {"level", T_INT, offsetof(Spans, level), 0, nullptr},
                               {"annotated", T_INT, offsetof(Spans, annotated), 0, nullptr},
                               {nullptr, 0, 0, 0, nullptr}};

PyType_Slot kSpansSlots[] = {{Py_tp_new, reinterpret_cast<void*>(spans_new)},
                             {Py_tp_dealloc, reinterpret_cast<void*>(dealloc<spans_clear>)},
                             {Py_tp_traverse, reinterpret_cast<void*>(spans_traverse)},
                             {Py_tp_clear, reinterpret_cast<void*>(spans_clear)},
                             {Py_tp_methods, kSpansMethods},
                             {Py_tp_members, kSpansMembers},
                             {0, nullptr}};
PyType_Spec kSpans = {"inferix_kernels._spans.Spans", sizeof(Spans), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                      kSpansSlots};

PyType_Slot kNothingSlots[] = {{0, nullptr}};
PyType_Spec kNothing = {"inferix_kernels._spans.Nothing", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT, kNothingSlots};

PyTypeObject* made_type(PyType_Spec& spec, std::initializer_list<PyMethodDef*> functions) {
  PyObject* const type = PyType_FromSpec(&spec);
  for (PyMethodDef* each : functions) {
    PyObject* const function = type ? PyCFunction_New(each, nullptr) : nullptr;
    const bool kept = function && PyObject_SetAttrString(type, each->ml_name, function) == 0;
    Py_XDECREF(function);
    if (!kept) return nullptr;
  }
  return as<PyTypeObject>(type);
}

}  // namespace

PyMODINIT_FUNC PyInit__spans() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_spans", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                   nullptr};
  PyObject* const rings = PyImport_ImportModule("inferix_kernels._ring");
  PyObject* const sum = rings ? PyObject_GetAttrString(rings, "Sum") : nullptr;
  Py_XDECREF(rings);
  if (!sum) return nullptr;
  sum_type = as<PyTypeObject>(sum);
  ring_type = made_type(kRing, {});
  span_type = made_type(kSpan, {&kEnter});
  timed_type = made_type(kTimed, {});
  PyTypeObject* const exit_type = made_type(kSpanExit, {});
  PyObject* const exit = exit_type ? exit_type->tp_alloc(exit_type, 0) : nullptr;
  for (PyTypeObject* type : {span_type, timed_type})
    if (!type || !exit || PyObject_SetAttrString(object(type), "__exit__", exit)) return nullptr;
  spans_type = made_type(kSpans, {});
  PyTypeObject* const function_type = made_type(kFunction, {});
  PyTypeObject* const nothing_type = made_type(kNothing, {&kEnter, &kExit});
  if (!ring_type || !spans_type || !function_type || !nothing_type) return nullptr;
  nothing = nothing_type->tp_alloc(nothing_type, 0);
  PyObject* const module = nothing ? PyModule_Create(&definition) : nullptr;
  if (!module) return nullptr;
  for (PyTypeObject* type : {ring_type, spans_type, function_type})
    if (PyModule_AddType(module, type)) return nullptr;
  return module;
}
