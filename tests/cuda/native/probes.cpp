// The bring-up's probes of the Hopper attention kernel, emulated on the CPU: a library that tests/cuda/machine.py calls
// with the structs of csrc/.
#include "describe.h"
#include "machine.h"

#include "../../../csrc/cuda/probes_sm90.cuh"
#include "../../../csrc/cuda/probes_sm90.h"

using namespace inferix;
using namespace inferix::sm90;

namespace {

template <Kind kKind, int kD>
void load(const ProbeLoadParams& p) {
  using S = SharedStorage<kKind, kD>;
  const uint64_t tiles = uint64_t(p.pages.pages) * p.shape.H, slots = tiles * p.shape.page_size;
  const TensorMap keys{static_cast<char*>(p.pages.k.codes),
                       S::kEightBit ? box_of_8_bit_keys(slots, kD) : box_of_16_bit_rows(slots, kD), S::kElementBytes};
  const TensorMap values{
      static_cast<char*>(p.pages.v.codes),
      S::kTransposed ? box_of_transposed_values(tiles * kD, kD, int(p.shape.page_size)) : box_of_16_bit_rows(slots, kD),
      S::kTransposed ? 1 : 2};
  AttentionArgs args{};
  args.k = p.pages.k;
  args.v = p.pages.v;
  args.page_size = int32_t(p.shape.page_size);
  probe_load_kernel<kKind, kD>(args, keys, values, p.first_row, p.second_row, p.head, static_cast<char*>(p.keys),
                               static_cast<char*>(p.values), p.key_scales, p.value_scales);
}

template <Kind kKind, int kD>
void multiply(const ProbeMultiplyParams& p) {
  if (p.values)
    probe_values_kernel<kKind, kD>(static_cast<const float*>(p.a), static_cast<const char*>(p.b), p.out);
  else
    probe_scores_kernel<kKind, kD>(static_cast<const char*>(p.a), static_cast<const char*>(p.b), p.out);
}

template <Kind... kKinds, typename Function>
void with_kind(const Pool& pool, bool eight_bit, const Function& function) {
  bool found = false;
  const auto try_kind = [&](auto kind) {
    constexpr Kind kKind = decltype(kind)::value;
    const Codecs codecs = codecs_of(kKind);
    if (found || codecs.k != pool.k.codec || codecs.v != pool.v.codec || (is_eight_bit(kKind) && !eight_bit)) return;
    found = true;
    if (pool.k.width == 128) function(kind, std::integral_constant<int, 128>{});
    else function(kind, std::integral_constant<int, 64>{});
  };
  (try_kind(std::integral_constant<Kind, kKinds>{}), ...);
  if (!found) fail("no kernel reads such pages");
}

template <typename Function>
void act(const Pool& pool, bool eight_bit, const Function& function) {
  Machine m(kWarpgroup, 0);
  machine = &m;
  with_kind<Kind::bf16, Kind::f16, Kind::i8f8, Kind::fp8, Kind::wide_int8, Kind::wide_i8f8, Kind::wide_fp8, Kind::wide_int4>(
      pool, eight_bit, [&](auto kind, auto width) { m.run(0, 0, [&] { function(kind, width); }); });
}

}  // namespace

extern "C" {

const char* describe() {
  static const Description description =
      Description().op<ProbeLoadParams>("probe_load").op<ProbeMultiplyParams>("probe_multiply");
  return description.text();
}
void probe_load(const ProbeLoadParams* p) {
  act(p->pages, p->eight_bit, [=](auto kind, auto width) { load<decltype(kind)::value, decltype(width)::value>(*p); });
}
void probe_multiply(const ProbeMultiplyParams* p) {
  act(p->like, p->eight_bit, [=](auto kind, auto width) { multiply<decltype(kind)::value, decltype(width)::value>(*p); });
}
}
