// inferix_kernels._C: every compiled kernel, as functions over raw addresses. The only file that knows Python.
//
// Tensors arrive as data_ptr(): the module then links neither torch nor its ABI. `stream` None runs the CPU kernel as
// `cpu` says; a number is a cudaStream_t.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "cuda/probes_sm90.h"
#include "kv_pages.h"
#include "linear.h"
#include "qkv.h"

namespace py = pybind11;
using namespace py::literals;
using namespace inferix;

namespace {

using Address = uintptr_t;
using Stream = std::optional<Address>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Pools pools_of(const std::vector<Pool>& list) {
  if (list.empty() || list.size() > kMaxPools)
    throw std::invalid_argument("pools must be 1 to " + std::to_string(kMaxPools) + ", got " +
                                std::to_string(list.size()));
  Pools pools{};
  for (const Pool& pool : list) pools.pool[pools.count++] = pool;
  return pools;
}

// Not deduced, so that a null pointer will do.
template <typename Params>
using CudaKernel = std::common_type_t<void (*)(const Params&, void* stream)>;

// Built without nvcc, an op's CUDA kernel is a null pointer.
#ifdef INFERIX_CUDA
#define INFERIX_CUDA_KERNEL(kernel) kernel
#else
#define INFERIX_CUDA_KERNEL(kernel) nullptr
#endif

template <typename Params>
void launch(const Params& params, Stream stream, const Cpu& cpu, void (*kernel)(const Params&, const Cpu&),
            CudaKernel<Params> cuda) {
  if (!stream && cpu.isa > best_isa()) throw std::invalid_argument("isa must be one that this CPU has");
  py::gil_scoped_release release;
  if (!stream) return kernel(params, cpu);
  if (!cuda) throw std::invalid_argument("this op has no CUDA kernel in this build");
  cuda(params, at<void>(*stream));
}

// Called with a number of bytes, returns the address of so much scratch memory on the op's device.
using Workspace = std::function<Address(int64_t)>;

template <typename Params>
void allot(const Workspace& workspace, Stream stream, int64_t (*bytes)(const Params&), Params& params) {
  if (stream && bytes) params.workspace = at<void>(workspace(bytes(params)));
}

void define_types(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::f32)
      .value("bfloat16", DType::bf16)
      .value("float16", DType::f16);
  py::enum_<Codec>(m, "Codec")
      .value("float32", Codec::f32)
      .value("bfloat16", Codec::bf16)
      .value("float16", Codec::f16)
      .value("int8_token", Codec::i8_token)
      .value("int8_channel", Codec::i8_channel)
      .value("e4m3_token", Codec::e4m3_token)
      .value("e4m3_channel", Codec::e4m3_channel)
      .value("u4_token", Codec::u4_token)
      .value("u4_channel", Codec::u4_channel);
  py::enum_<Isa>(m, "Isa", py::arithmetic(), "Sets of instructions; each has those of the ones before it.")
      .value("portable", Isa::portable)
      .value("avx2", Isa::avx2)
      .value("avx512", Isa::avx512)
      .value("avx512_vnni", Isa::avx512_vnni)
      .value("avx512_bf16", Isa::avx512_bf16);
  py::class_<Cpu>(m, "Cpu").def(py::init([](int threads, Isa isa) { return Cpu{threads, isa}; }));
  m.def("best_isa", best_isa, "The last Isa that this CPU has.");
  py::class_<Plane>(m, "Plane").def(
      py::init([](Address codes, Address scales, Address offsets, int64_t width, Codec codec) {
        return Plane{at<void>(codes), at<void>(scales), at<void>(offsets), width, codec};
      }));
  py::class_<Pool>(m, "Pool").def(
      py::init([](const Plane& k, const Plane& v, int64_t pages) { return Pool{k, v, pages}; }));
  py::class_<PageShape>(m, "PageShape").def(
      py::init([](int64_t H, int64_t page_size) { return PageShape{H, page_size}; }));
  py::class_<Rows>(m, "Rows").def(py::init([](Address data, int64_t token_stride, int64_t head_stride) {
    return Rows{at<void>(data), token_stride, head_stride};
  }));
  py::class_<PageList>(m, "PageList").def(py::init([](Address ids, Address lens, int64_t n) {
    return PageList{at<const int32_t>(ids), at<const int32_t>(lens), n};
  }));
}

void define_kv_pages(py::module_& m) {
  m.def(
      "kv_append",
      [](const Rows& k, const Rows& v, const Pool& pages, const PageList& where, const PageShape& shape, int64_t T,
         DType x_dtype, Stream stream, const Cpu& cpu) {
        const KvAppendParams params{k, v, pages, where, shape, T, x_dtype};
        launch(params, stream, cpu, kv_append_cpu, INFERIX_CUDA_KERNEL(kv_append_cuda));
      },
      py::kw_only(), "k"_a, "v"_a, "pages"_a, "where"_a, "shape"_a, "T"_a, "x_dtype"_a, "stream"_a, "cpu"_a);
  m.def(
      "kv_commit",
      [](const Pool& source, const PageList& source_list, const Pool& target, const PageList& target_list,
         Address k_mean, const PageShape& shape, Stream stream, const Cpu& cpu) {
        const KvCommitParams params{source, target, source_list, target_list, at<float>(k_mean), shape};
        launch(params, stream, cpu, kv_commit_cpu, INFERIX_CUDA_KERNEL(kv_commit_cuda));
      },
      py::kw_only(), "source"_a, "source_list"_a, "target"_a, "target_list"_a, "k_mean"_a, "shape"_a, "stream"_a,
      "cpu"_a);
  m.def(
      "kv_gather",
      [](const std::vector<Pool>& pools, const PageList& where, const PageShape& shape, const Rows& k, const Rows& v,
         int64_t T, DType out_dtype, Stream stream, const Cpu& cpu) {
        const KvGatherParams params{pools_of(pools), where, shape, k, v, T, out_dtype};
        launch(params, stream, cpu, kv_gather_cpu, INFERIX_CUDA_KERNEL(kv_gather_cuda));
      },
      py::kw_only(), "pools"_a, "where"_a, "shape"_a, "k"_a, "v"_a, "T"_a, "out_dtype"_a, "stream"_a, "cpu"_a);
}

void define_attention(py::module_& m) {
  m.def(
      "paged_attention",
      [](const Rows& q, const Rows& out, Address lse, const std::vector<Pool>& pools, Address q_indptr,
         Address page_indptr, const PageList& entries, Address page_bias, Address page_variants,
         const PageShape& shape, int64_t q_variant_stride, int64_t variants, int64_t T, int64_t query_heads,
         int64_t segments, int64_t lists_per_segment, float scale, bool accumulate, bool eight_bit, DType q_dtype,
         DType out_dtype, const Workspace& workspace, Stream stream, const Cpu& cpu) {
        PagedAttentionParams params{
            q, q_variant_stride, out, at<float>(lse), pools_of(pools), at<const int32_t>(q_indptr),
            at<const int32_t>(page_indptr), entries, at<const float>(page_bias), at<const int32_t>(page_variants),
            shape, variants, T, query_heads, segments, lists_per_segment, scale, accumulate, eight_bit, q_dtype,
            out_dtype, nullptr};
        allot<PagedAttentionParams>(workspace, stream, INFERIX_CUDA_KERNEL(paged_attention_workspace), params);
        launch(params, stream, cpu, paged_attention_cpu, INFERIX_CUDA_KERNEL(paged_attention_cuda));
      },
      py::kw_only(), "q"_a, "out"_a, "lse"_a, "pools"_a, "q_indptr"_a, "page_indptr"_a, "entries"_a, "page_bias"_a,
      "page_variants"_a, "shape"_a, "q_variant_stride"_a, "variants"_a, "T"_a, "query_heads"_a, "segments"_a,
      "lists_per_segment"_a, "scale"_a, "accumulate"_a, "eight_bit"_a, "q_dtype"_a, "out_dtype"_a, "workspace"_a,
      "stream"_a, "cpu"_a);
  m.def(
      "merge_attention",
      [](Address out_a, Address lse_a, Address out_b, Address lse_b, Address out, Address lse, int64_t rows, int64_t D,
         DType in_dtype, DType out_dtype, Stream stream, const Cpu& cpu) {
        const MergeAttentionParams params{at<void>(out_a), at<void>(out_b), at<float>(lse_a), at<float>(lse_b),
                                          at<void>(out), at<float>(lse), rows, D, in_dtype, out_dtype};
        launch(params, stream, cpu, merge_attention_cpu, INFERIX_CUDA_KERNEL(merge_attention_cuda));
      },
      py::kw_only(), "out_a"_a, "lse_a"_a, "out_b"_a, "lse_b"_a, "out"_a, "lse"_a, "rows"_a, "D"_a, "in_dtype"_a,
      "out_dtype"_a, "stream"_a, "cpu"_a);
}

void define_qkv(py::module_& m) {
  m.def(
      "qkv_prologue",
      [](Address qkv, int64_t qkv_stride, Address q, Address bias, Address norm_q, Address norm_q_bias,
         int64_t norm_q_size, Address norm_k, Address norm_k_bias, int64_t norm_k_size, Address rope,
         int64_t rope_pairs, Address k_mean, bool interleaved, float eps, const Pool& pages, const PageList& where,
         const PageShape& shape, int64_t T, int64_t query_heads, DType dtype,
         const Workspace& workspace, Stream stream, const Cpu& cpu) {
        QkvPrologueParams params{at<void>(qkv), at<void>(q), qkv_stride, at<float>(bias), at<float>(norm_q),
                                       at<float>(norm_k), at<float>(norm_q_bias), at<float>(norm_k_bias),
                                       norm_q_size, norm_k_size, at<float>(rope), at<float>(k_mean), rope_pairs,
                                       interleaved, eps, pages, where, shape, T, query_heads, dtype, nullptr};
        allot<QkvPrologueParams>(workspace, stream, INFERIX_CUDA_KERNEL(qkv_prologue_workspace), params);
        launch(params, stream, cpu, qkv_prologue_cpu, INFERIX_CUDA_KERNEL(qkv_prologue_cuda));
      },
      py::kw_only(), "qkv"_a, "qkv_stride"_a, "q"_a, "bias"_a, "norm_q"_a, "norm_q_bias"_a, "norm_q_size"_a,
      "norm_k"_a, "norm_k_bias"_a, "norm_k_size"_a, "rope"_a, "rope_pairs"_a, "k_mean"_a,
      "interleaved"_a, "eps"_a, "pages"_a, "where"_a, "shape"_a, "T"_a, "query_heads"_a, "dtype"_a,
      "workspace"_a, "stream"_a, "cpu"_a);
}

void define_linear(py::module_& m) {
  py::enum_<Norm>(m, "Norm").value("none", Norm::none).value("layer", Norm::layer).value("rms", Norm::rms);
  py::enum_<Activation>(m, "Activation")
      .value("none", Activation::none)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh);
  py::class_<Groups>(m, "Groups").def(
      py::init([](Address data, int64_t groups) { return Groups{at<const float>(data), groups}; }));
  m.def(
      "quantize_rows",
      [](Address x, int64_t x_stride, Address weight, Address bias, const Groups& scale, const Groups& shift,
         Address codes, Address scales, int64_t M, int64_t K, float eps, Norm norm, Activation activation, Codec codec,
         DType x_dtype, Stream stream, const Cpu& cpu) {
        const QuantizeRowsParams params{at<void>(x), x_stride, at<float>(weight), at<float>(bias), scale, shift,
                                        at<void>(codes), at<float>(scales), M, K, eps, norm, activation, codec,
                                        x_dtype};
        launch(params, stream, cpu, quantize_rows_cpu, nullptr);
      },
      py::kw_only(), "x"_a, "x_stride"_a, "weight"_a, "bias"_a, "scale"_a, "shift"_a, "codes"_a, "scales"_a, "M"_a,
      "K"_a, "eps"_a, "norm"_a, "activation"_a, "codec"_a, "x_dtype"_a, "stream"_a, "cpu"_a);
  m.def(
      "linear",
      [](Address x, Address weight, Address x_scales, Address weight_scales, Address bias, const Groups& gate,
         Address residual, Address out, int64_t M, int64_t N, int64_t K, Activation activation, Codec codec,
         DType residual_dtype, DType out_dtype, Stream stream, const Cpu& cpu) {
        const LinearParams params{at<void>(x), at<void>(weight), at<float>(x_scales), at<float>(weight_scales),
                                  at<float>(bias), gate, at<void>(residual), at<void>(out), M, N, K, activation, codec,
                                  residual_dtype, out_dtype};
        launch(params, stream, cpu, linear_cpu, nullptr);
      },
      py::kw_only(), "x"_a, "weight"_a, "x_scales"_a, "weight_scales"_a, "bias"_a, "gate"_a, "residual"_a, "out"_a,
      "M"_a, "N"_a, "K"_a, "activation"_a, "codec"_a, "residual_dtype"_a, "out_dtype"_a, "stream"_a, "cpu"_a);
}

#ifdef INFERIX_CUDA
void define_probes(py::module_& m) {
  m.def(
      "probe_load",
      [](const Pool& pages, const PageShape& shape, bool eight_bit, int first_row, int second_row, int head,
         Address keys, Address values, Address key_scales, Address value_scales, Address stream) {
        probe_load_cuda({pages, shape, eight_bit, first_row, second_row, head, at<void>(keys), at<void>(values),
                         at<float>(key_scales), at<float>(value_scales)},
                        at<void>(stream));
      },
      py::kw_only(), "pages"_a, "shape"_a, "eight_bit"_a, "first_row"_a, "second_row"_a, "head"_a, "keys"_a, "values"_a,
      "key_scales"_a, "value_scales"_a, "stream"_a);
  m.def(
      "probe_multiply",
      [](const Pool& like, bool eight_bit, bool values, Address a, Address b, Address out, Address stream) {
        probe_multiply_cuda({like, eight_bit, values, at<void>(a), at<void>(b), at<float>(out)}, at<void>(stream));
      },
      py::kw_only(), "like"_a, "eight_bit"_a, "values"_a, "a"_a, "b"_a, "out"_a, "stream"_a);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::register_exception<Unsupported>(m, "Unsupported");
  define_types(m);
  define_kv_pages(m);
  define_attention(m);
  define_qkv(m);
  define_linear(m);
  m.attr("max_pools") = kMaxPools;
#ifdef INFERIX_CUDA
  define_probes(m);
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
