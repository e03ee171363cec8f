// The fields of the structs that cross a boundary, by name. A struct lists its own once more, with INFERIX_FIELDS; from
// that list bindings.cpp reads it out of Python's keywords, and the tests lay it out for ctypes.
#pragma once
#include <cstddef>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

// Inside a struct, after its fields: all of them, in their order.
#define INFERIX_FIELDS(...)                                \
  static constexpr const char* kFieldNames = #__VA_ARGS__; \
  auto fields() { return std::tie(__VA_ARGS__); }

namespace inferix {

template <typename Struct, typename = void>
struct has_fields : std::false_type {};
template <typename Struct>
struct has_fields<Struct, std::void_t<decltype(Struct::kFieldNames)>> : std::true_type {};

struct AnyField {
  template <typename Field>
  operator Field() const;
};
template <typename Struct, size_t... kFields>
auto holds(std::index_sequence<kFields...>) -> decltype(Struct{(void(kFields), AnyField{})...}, std::true_type{});
template <typename Struct>
auto holds(...) -> std::false_type;
template <typename Struct, size_t kCount>
constexpr bool kHolds = decltype(holds<Struct>(std::make_index_sequence<kCount>{}))::value;
template <typename... Fields>  // in place of an array its elements could stand
constexpr bool has_array(const std::tuple<Fields&...>*) { return (std::is_array_v<Fields> || ...); }

// visit(name, field), one field after the other.
template <typename Struct, typename Visit>
void each_field(Struct& object, Visit&& visit) {
  using Fields = decltype(object.fields());
  constexpr size_t kCount = std::tuple_size_v<Fields>;
  static_assert(has_array(static_cast<Fields*>(nullptr)) || (kHolds<Struct, kCount> && !kHolds<Struct, kCount + 1>),
                "INFERIX_FIELDS must list every field");
  std::string_view names = Struct::kFieldNames;
  const auto next = [&names] {
    const std::string_view name = names.substr(0, names.find(','));
    names.remove_prefix(name.size() < names.size() ? name.size() + 2 : name.size());  // ", "
    return name;
  };
  std::apply([&](auto&... field) { (visit(next(), field), ...); }, object.fields());
}

}  // namespace inferix
