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
  TensorMaps maps{};
  maps.keys[0] = {static_cast<char*>(p.pages.k.codes),
                       S::kEightBit ? box_of_8_bit_keys(slots, kD) : box_of_16_bit_rows(slots, kD), S::kElementBytes};
  maps.values[0] = {
      static_cast<char*>(p.pages.v.codes),
      S::kEightBit     ? box_of_8_bit_values(tiles * kD, kD, int(p.shape.page_size))
      : S::kTransposed ? box_of_transposed_values(tiles * kD, kD, int(p.shape.page_size))
                       : box_of_16_bit_rows(slots, kD),
      S::kTransposed ? 1 : 2};
  AttentionArgs args{};
  args.k[0] = p.pages.k;
  args.v[0] = p.pages.v;
  args.page_size = int32_t(p.shape.page_size);
  probe_load_kernel<kKind, kD>(args, maps, p.first_row, p.second_row, p.head, static_cast<char*>(p.keys),
                               static_cast<char*>(p.values), p.key_scales, p.value_scales);
}

template <Kind kKind, int kD>
void multiply(const ProbeMultiplyParams& p) {
  if (p.values)
    probe_values_kernel<kKind, kD>(static_cast<const float*>(p.a), static_cast<const char*>(p.b), p.out);
  else
    probe_scores_kernel<kKind, kD>(static_cast<const char*>(p.a), static_cast<const char*>(p.b), p.out);
}

template <typename Function>
void emulate(const Pool& pool, bool eight_bit, const Function& function) {
  Machine m(kWarpgroup, 0);
  machine = &m;
  const bool found = with_kind(pool, eight_bit, [&](auto kind) {
    m.run(0, 0, [&] {
      if (pool.k.width == 128) function(kind, std::integral_constant<int, 128>{});
      else function(kind, std::integral_constant<int, 64>{});
    });
  });
  if (!found) fail("no kernel reads such pages");
}

}  // namespace

extern "C" {

const char* describe() {
  static const Description description =
      Description().op<ProbeLoadParams>("probe_load").op<ProbeMultiplyParams>("probe_multiply");
  return description.text();
}
// A line for each kind in order: codecs of keys and values, whether it multiplies in 8 bits, its name.
const char* kinds() {
  static std::string text;
  text.clear();
  for_each_kind([](auto kind) {
    constexpr KindTraits kTraits = traits_of(decltype(kind)::value);
    for (int number : {int(kTraits.k), int(kTraits.v), int(kTraits.eight_bit)}) text += std::to_string(number) + " ";
    text += std::string(kTraits.name) + "\n";
  });
  return text.c_str();
}
void probe_load(const ProbeLoadParams* p) {
  emulate(p->pages, p->eight_bit,
          [=](auto kind, auto width) { load<decltype(kind)::value, decltype(width)::value>(*p); });
}
void probe_multiply(const ProbeMultiplyParams* p) {
  emulate(p->like, p->eight_bit,
          [=](auto kind, auto width) { multiply<decltype(kind)::value, decltype(width)::value>(*p); });
}
}
