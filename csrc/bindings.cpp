// inferix_kernels._C: every compiled kernel, as functions over raw addresses.
//
// A kernel takes one dict, which has a value for every field of its struct and nothing else; a struct within it is a
// dict in turn. Tensors arrive as data_ptr(): the module then links neither torch nor its ABI. `stream` None runs the CPU
// kernel as `cpu` says; a number is a cudaStream_t.
//
// Long because it is, with spans.cpp, the only file that knows Python: structs are read here, arguments described, calls made again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "cuda/probes_sm90.h"
#include "dlpack.h"
#include "kv_pages.h"
#include "linear.h"
#include "qkv.h"

namespace py = pybind11;
using namespace py::literals;
using namespace inferix;

namespace {

using Address = uintptr_t;
using Stream = std::optional<Address>;

// Scratch memory, which no caller gives: launch asks for it when it knows how much.
constexpr std::string_view kWorkspace = "workspace";

// Python's strings of the names, made once.
template <typename Struct>
const std::vector<PyObject*>& names_of() {
  static const std::vector<PyObject*> names = [] {
    std::vector<PyObject*> made;
    Struct object{};
    each_field(object, [&](std::string_view name, auto&) {
      made.push_back(PyUnicode_InternFromString(std::string(name).c_str()));
    });
    return made;
  }();
  return names;
}

// Which fields of a struct are the addresses of which tensors.
struct Slots {
  struct Slot {
    size_t offset, tensor;
  };
  const void* base;  // of the struct that is read
  py::args values;   // the call's tensors
  std::vector<Slot> found;

  // An address that Python has made says of which tensor it is.
  void add(py::handle address, const void* field) {
    const py::object owner = py::getattr(address, "tensor", py::none());
    for (size_t i = 0; i < values.size(); ++i) {
      if (py::object(values[i]).ptr() != owner.ptr()) continue;
      found.push_back({static_cast<size_t>(static_cast<const char*>(field) - static_cast<const char*>(base)), i});
      return;
    }
    throw py::type_error("is the address of no argument");
  }
};
thread_local Slots* recorded = nullptr;  // while a struct is read of which they are wanted

template <typename Field>
void read(py::handle value, Field& field);

void read(py::handle value, Pools& pools) {
  if (!py::isinstance<py::sequence>(value)) throw py::type_error("must be a sequence of pools");
  const auto list = py::reinterpret_borrow<py::sequence>(value);
  if (list.size() < 1 || list.size() > kMaxPools)
    throw std::invalid_argument("pools must be 1 to " + std::to_string(kMaxPools) + ", got " +
                                std::to_string(list.size()));
  for (const py::handle pool : list) read(pool, pools.pool[pools.count++]);
}

template <typename Struct>
void read_fields(py::handle given, Struct& object) {
  if (!PyDict_Check(given.ptr())) throw py::type_error("must be a dict of its fields");
  const std::vector<PyObject*>& names = names_of<Struct>();
  size_t i = 0, found = 0;
  each_field(object, [&](std::string_view name, auto& field) {
    PyObject* const key = names[i++];
    if (name == kWorkspace) return;
    PyObject* const value = PyDict_GetItemWithError(given.ptr(), key);
    if (!value) throw py::type_error(std::string(name) + " is missing");
    ++found;
    try {
      read(value, field);
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(name) + " cannot be " + std::string(py::repr(value)));
    } catch (const py::reference_cast_error&) {  // None, of an enumeration
      throw py::type_error(std::string(name) + " cannot be None");
    } catch (const py::type_error& error) {
      throw py::type_error(std::string(name) + ": " + error.what());
    }
  });
  if (static_cast<size_t>(PyDict_GET_SIZE(given.ptr())) == found) return;
  for (const auto& item : py::reinterpret_borrow<py::dict>(given)) {
    bool known = false;
    each_field(object, [&](std::string_view name, auto&) { known |= name == std::string(py::str(item.first)); });
    if (!known) throw py::type_error("there is no field " + std::string(py::str(item.first)));
  }
  throw py::type_error(std::string(kWorkspace) + " is not the caller's to give");
}

template <typename Field>
void read(py::handle value, Field& field) {
  if constexpr (has_fields<Field>::value) {
    read_fields(value, field);
  } else if constexpr (std::is_pointer_v<Field>) {
    const auto address = value.cast<Address>();
    field = reinterpret_cast<Field>(address);
    if (address && recorded) recorded->add(value, &field);
  } else {
    field = value.cast<Field>();
  }
}

// Not deduced, so that a null pointer will do.
template <typename Params>
using CpuKernel = std::common_type_t<void (*)(const Params&, const Cpu&)>;
template <typename Params>
using CudaKernel = std::common_type_t<void (*)(const Params&, void* stream)>;
template <typename Params>
using Bytes = std::common_type_t<int64_t (*)(const Params&)>;

// Built without nvcc, an op's CUDA kernel is a null pointer.
#ifdef INFERIX_CUDA
#define INFERIX_CUDA_KERNEL(kernel) kernel
#else
#define INFERIX_CUDA_KERNEL(kernel) nullptr
#endif

// The types whose tensors are read without Python, and how; no types if their library has no such functions.
struct Tensors {
  std::vector<PyTypeObject*> types;
  PyTypeObject* dtype = nullptr;  // of their dtypes
  PyObject* is_neg = nullptr;     // their method
  const DlExchange* exchange = nullptr;

  bool has(PyObject* object) const { return std::find(types.begin(), types.end(), Py_TYPE(object)) != types.end(); }

  // Whether `object` is one of these, with its numbers in memory; what it is.
  bool read(PyObject* object, DlTensor& tensor) const {
    if (!has(object)) return false;
    if (exchange->from_object(object, &tensor)) return PyErr_Clear(), false;
    // The address of a view of an emptied storage is its offset: no tensor is so large that one reaches kLowest.
    constexpr uintptr_t kLowest = uintptr_t{1} << 44;
    const bool empty = std::count(tensor.shape, tensor.shape + tensor.ndim, 0);
    return tensor.byte_offset == 0 && tensor.lanes == 1 &&
           (empty || reinterpret_cast<uintptr_t>(tensor.data) >= kLowest);
  }
};

Tensors& tensors() {
  static Tensors all;
  return all;
}

// Of types that share the first one's functions.
void read_tensors_of(const py::args& types, const py::type& dtype) {
  Tensors all;
  const py::object capsule = py::getattr(types[0], "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), DlExchange::kCapsule))
    all.exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), DlExchange::kCapsule));
  if (all.exchange && all.exchange->major == DlExchange::kMajor && all.exchange->from_object)
    for (const py::handle type : types) all.types.push_back(reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()));
  all.dtype = reinterpret_cast<PyTypeObject*>(dtype.inc_ref().ptr());
  all.is_neg = py::getattr(types[0], "is_neg").release().ptr();
  tensors() = all;
}

// What values are, but not where tensors lie nor what they hold: of two that are alike the keys are equal.
class Description {
 public:
  explicit Description(bool gradients) : gradients_(gradients) { put(gradients); }

  // False for what must be looked at more closely.
  bool add(PyObject* value) {
    if (value == Py_None) return put('n'), true;
    if (PyTuple_Check(value) || PyList_CheckExact(value)) return add_sequence(value);
    if (PyBool_Check(value)) return put(value == Py_True ? '1' : '0'), true;
    if (PyFloat_CheckExact(value)) return put('f'), put(PyFloat_AS_DOUBLE(value)), true;
    if (PyLong_CheckExact(value)) {
      int overflow;
      const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
      return put('i'), put(number), !overflow;
    }
    if (PyUnicode_CheckExact(value) || Py_TYPE(value) == tensors().dtype)
      return put('o'), objects_.add(value), true;
    return add_tensor(value);
  }

  // A key for a dict, or None. It keeps the objects in it alive, so that no other can take their place.
  PyObject* key() const {
    if (size_ > sizeof bytes_ || std::max(objects_.count, tensors_.count) > Objects::kMost) Py_RETURN_NONE;
    PyObject* const made = PyTuple_New(objects_.count + 1);
    PyObject* const bytes = made ? PyBytes_FromStringAndSize(bytes_, size_) : nullptr;
    if (!bytes) return Py_XDECREF(made), nullptr;
    PyTuple_SET_ITEM(made, 0, bytes);
    for (size_t i = 0; i < objects_.count; ++i)
      PyTuple_SET_ITEM(made, i + 1, py::handle(objects_.of[i]).inc_ref().ptr());
    return made;
  }

 private:
  template <typename Value>
  void put(Value value) {
    put(&value, sizeof value);
  }

  // Past the end it is only counted: then there is no key.
  void put(const void* bytes, size_t count) {
    if (size_ + count <= sizeof bytes_) std::memcpy(bytes_ + size_, bytes, count);
    size_ += count;
  }

  bool add_sequence(PyObject* value) {
    constexpr int kDeepest = 8;  // a list may be in itself
    if (++depth_ > kDeepest) return false;
    put('t'), put(PySequence_Fast_GET_SIZE(value));
    objects_.add(reinterpret_cast<PyObject*>(Py_TYPE(value)));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i)
      if (!add(PySequence_Fast_GET_ITEM(value, i))) return false;
    --depth_;
    return true;
  }

  bool add_tensor(PyObject* value) {
    DlTensor tensor;
    if (!tensors().read(value, tensor)) return false;
    const auto negated = py::reinterpret_steal<py::object>(PyObject_CallOneArg(tensors().is_neg, value));
    if (!negated) return PyErr_Clear(), false;
    if (negated.ptr() != Py_False) return false;
    bool gradient = false;
    if (gradients_) {
      static PyObject* const name = PyUnicode_InternFromString("requires_grad");
      const auto required = py::reinterpret_steal<py::object>(PyObject_GetAttr(value, name));
      if (!required) return PyErr_Clear(), false;
      gradient = required.ptr() != Py_False;
    }
    bool contiguous = true;
    for (int64_t i = tensor.ndim - 1, size = 1; i >= 0; size *= tensor.shape[i--]) contiguous &= tensor.strides[i] == size;
    // A tensor that is given twice is one in all calls that are alike.
    const auto first = tensors_.add(value);
    const struct {
      char kind;
      uint8_t code, bits, is_contiguous, gradient, ndim;
      int16_t first;
      int32_t device_type, device_id;
    } head{'x', tensor.code, tensor.bits, contiguous, gradient, static_cast<uint8_t>(tensor.ndim),
           static_cast<int16_t>(first), tensor.device_type, tensor.device_id};
    static_assert(std::has_unique_object_representations_v<decltype(head)>);
    put(head), put(tensor.shape, tensor.ndim * sizeof(int64_t));
    if (!contiguous) put(tensor.strides, tensor.ndim * sizeof(int64_t));
    return true;
  }

  // Objects in the order in which they came. Past the last only counted: then there is no key.
  struct Objects {
    static constexpr size_t kMost = 128;
    PyObject* of[kMost];
    size_t count = 0;

    // Where it is for the first time.
    size_t add(PyObject* object) {
      const size_t known = std::min(count, kMost);
      if (known < kMost) of[known] = object;
      ++count;
      return std::find(of, of + known, object) - of;
    }
  };

  const bool gradients_;
  int depth_ = 0;  // in tuples and lists
  size_t size_ = 0;
  Objects objects_, tensors_;  // objects: strings, dtypes and types of tuples
  char bytes_[1 << 14];
};

// Not through pybind11, whose way to a function costs as much as this one's work.
PyObject* describe(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (count < 1 || !PyBool_Check(values[0]))
    return PyErr_SetString(PyExc_TypeError, "gradients must be a bool"), nullptr;
  Description description(values[0] == Py_True);
  for (Py_ssize_t i = 1; i < count; ++i)
    if (!description.add(values[i])) Py_RETURN_NONE;
  return description.key();
}

PyMethodDef kDescribe[] = {
    {"describe", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(describe)), METH_FASTCALL,
     "describe(gradients: bool, *values: object) -> tuple | None\n\nA key for a dict: what tensors, dtypes, numbers, "
     "strings, None, and tuples and lists of these are, but neither where tensors lie nor what they hold. None where "
     "something must be looked at more closely."},
    {nullptr, nullptr, 0, nullptr}};

// A call of a CPU kernel as it was made once, to be made again with other tensors of the same kinds.
template <typename Params>
class Replay {
 public:
  Replay(const Params& params, std::vector<Slots::Slot> slots, CpuKernel<Params> kernel)
      : params_(params), slots_(std::move(slots)), kernel_(kernel) {}

  // False, and nothing has run, if a tensor must be looked at more closely.
  bool operator()(int threads, Isa isa, const py::args& values) const {
    Places places;
    if (!collect(values.ptr(), places)) return false;
    Params params = params_;
    for (const Slots::Slot& slot : slots_) {
      if (slot.tensor >= places.count || !places.address[slot.tensor]) return false;
      std::memcpy(reinterpret_cast<char*>(&params) + slot.offset, &places.address[slot.tensor], sizeof(void*));
    }
    py::gil_scoped_release release;
    kernel_(params, Cpu{threads, isa});
    return true;
  }

 private:
  static_assert(std::is_trivially_copyable_v<Params>);
  struct Places {
    void* address[96];
    size_t count = 0;
  };

  // Of the tensors in `value`, in order; null where one is not aligned.
  static bool collect(PyObject* value, Places& places) {
    if (value == Py_None) return true;
    if (PyTuple_Check(value) || PyList_CheckExact(value)) {
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i)
        if (!collect(PySequence_Fast_GET_ITEM(value, i), places)) return false;
      return true;
    }
    if (!tensors().has(value)) return true;
    DlTensor tensor;
    if (places.count == std::size(places.address) || !tensors().read(value, tensor)) return false;
    const bool aligned = tensor.bits % 8 == 0 && reinterpret_cast<uintptr_t>(tensor.data) % (tensor.bits / 8) == 0;
    places.address[places.count++] = aligned ? tensor.data : nullptr;
    return true;
  }

  const Params params_;
  const std::vector<Slots::Slot> slots_;
  const CpuKernel<Params> kernel_;
};

// `workspace`, called with a number of bytes, returns the address of so much scratch memory on the op's device.
template <typename Params>
void define(py::module_& m, const char* name, CpuKernel<Params> on_cpu, CudaKernel<Params> on_cuda,
            Bytes<Params> bytes = nullptr) {
  m.def(
      name,
      [=](const py::dict& arguments, Stream stream, const py::object& cpu, const py::object& workspace) {
        Params params{};
        read_fields(arguments, params);
        Cpu how{};
        if (!stream) read_fields(cpu, how);
        if (how.isa > best_isa()) throw std::invalid_argument("isa must be one that this CPU has");
        if (stream && bytes) {
          void* const memory = reinterpret_cast<void*>(workspace(bytes(params)).template cast<Address>());
          each_field(params, [&](std::string_view field_name, auto& field) {
            if constexpr (std::is_same_v<decltype(field), void*&>)
              if (field_name == kWorkspace) field = memory;
          });
        }
        py::gil_scoped_release release;
        if (!stream && on_cpu) return on_cpu(params, how);
        if (!stream || !on_cuda) throw std::invalid_argument("this op has no such kernel in this build");
        on_cuda(params, reinterpret_cast<void*>(*stream));
      },
      "arguments"_a, py::kw_only(), "stream"_a = py::none(), "cpu"_a = py::none(), "workspace"_a = py::none());
  if (on_cuda) m.attr("cuda_ops").cast<py::set>().add(name);
  if (!on_cpu) return;
  m.attr("replays")[name] = py::cpp_function([=](const py::dict& arguments, const py::args& values) {
    Params params{};
    Slots slots{&params, values, {}};
    recorded = &slots;
    const auto done = std::unique_ptr<Slots*, void (*)(Slots**)>(&recorded, [](Slots** slot) { *slot = nullptr; });
    read_fields(arguments, params);
    return py::cpp_function(Replay<Params>(params, std::move(slots.found), on_cpu));
  });
}

// Each is local to its module: a process may hold the extension twice, the package's and that of an exported copy.
void define_types(py::module_& m) {
  py::enum_<DType>(m, "DType", py::module_local())
      .value("float32", DType::f32)
      .value("bfloat16", DType::bf16)
      .value("float16", DType::f16);
  py::enum_<Precision>(m, "Precision", py::module_local())
      .value("exact", Precision::exact)
      .value("eight_bit", Precision::eight_bit)
      .value("automatic", Precision::automatic);
  py::enum_<Codec>(m, "Codec", py::module_local())
      .value("float32", Codec::f32)
      .value("bfloat16", Codec::bf16)
      .value("float16", Codec::f16)
      .value("int8_token", Codec::i8_token)
      .value("int8_channel", Codec::i8_channel)
      .value("e4m3_token", Codec::e4m3_token)
      .value("e4m3_channel", Codec::e4m3_channel)
      .value("u4_token", Codec::u4_token)
      .value("u4_channel", Codec::u4_channel);
  py::enum_<Isa>(m, "Isa", py::arithmetic(), py::module_local(),
                 "Sets of instructions; each has those of the ones before it.")
      .value("portable", Isa::portable)
      .value("avx2", Isa::avx2)
      .value("avx512", Isa::avx512)
      .value("avx512_vnni", Isa::avx512_vnni)
      .value("avx512_bf16", Isa::avx512_bf16)
      .value("amx", Isa::amx);
  m.def("best_isa", best_isa, "The last Isa that this CPU has.");
  m.def("default_isa", default_isa, "The Isa that is fastest on this CPU.");
  py::enum_<Norm>(m, "Norm", py::module_local())
      .value("none", Norm::none)
      .value("layer", Norm::layer)
      .value("rms", Norm::rms);
  py::enum_<Activation>(m, "Activation", py::module_local())
      .value("none", Activation::none)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh);
}

// Of the package whose extension this is.
std::string& package() {
  static std::string name;
  return name;
}

// As the package's own exception, which the reference raises too.
void raise_not_arrived(std::exception_ptr thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const NotArrived& error) {
    const py::object kind = py::module_::import((package() + ".arrivals").c_str()).attr("NotArrived");
    PyErr_SetObject(kind.ptr(), kind(error.pages, error.deadline).ptr());
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::register_local_exception<Unsupported>(m, "Unsupported");
  const auto name = m.attr("__name__").cast<std::string>();
  package() = name.substr(0, name.rfind('.'));
  py::register_local_exception_translator(raise_not_arrived);
  define_types(m);
  m.attr("max_pools") = kMaxPools;
  m.attr("replays") = py::dict();  // by name: from the arguments of a call on the CPU, and its tensors, what makes it again
  m.def("read_tensors_of", read_tensors_of, "The types of tensors, and of their dtypes, that describe and replays know.",
        py::kw_only(), "dtype"_a);
  if (PyModule_AddFunctions(m.ptr(), kDescribe)) throw py::error_already_set();
  m.def(
      "raise_to", [](Address counter, int32_t value) { raise_to(reinterpret_cast<int32_t*>(counter), value); },
      "Raise the int32 at this address to `value`, if it is lower: who sees that sees all that was written before.",
      "counter"_a, "value"_a);
  m.attr("cuda_ops") = py::set();  // names of the functions that have a CUDA kernel
  define<KvAppendParams>(m, "kv_append", kv_append_cpu, INFERIX_CUDA_KERNEL(kv_append_cuda));
  define<KvCommitParams>(m, "kv_commit", kv_commit_cpu, INFERIX_CUDA_KERNEL(kv_commit_cuda));
  define<KvGatherParams>(m, "kv_gather", kv_gather_cpu, INFERIX_CUDA_KERNEL(kv_gather_cuda));
  define<PagedAttentionParams>(m, "paged_attention", paged_attention_cpu, INFERIX_CUDA_KERNEL(paged_attention_cuda),
                               INFERIX_CUDA_KERNEL(paged_attention_workspace));
  define<PagedAttentionParams>(m, "prepare_attention", nullptr, INFERIX_CUDA_KERNEL(prepare_attention_cuda),
                               INFERIX_CUDA_KERNEL(prepared_attention_bytes));
  define<MergeAttentionParams>(m, "merge_attention", merge_attention_cpu, INFERIX_CUDA_KERNEL(merge_attention_cuda));
  define<QkvPrologueParams>(m, "qkv_prologue", qkv_prologue_cpu, INFERIX_CUDA_KERNEL(qkv_prologue_cuda),
                            INFERIX_CUDA_KERNEL(qkv_prologue_workspace));
  define<RowsParams>(m, "quantize_rows", rows_cpu, nullptr);
  define<RowsParams>(m, "add_norm", rows_cpu, nullptr);
  define<LinearParams>(m, "linear", linear_cpu, nullptr);
#ifdef INFERIX_CUDA
  define<ProbeLoadParams>(m, "probe_load", nullptr, probe_load_cuda);
  define<ProbeMultiplyParams>(m, "probe_multiply", nullptr, probe_multiply_cuda);
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
