// The structs that a library's functions take, laid out in words, so that Python can make them: their fields as
// INFERIX_FIELDS lists them. tests/cuda/machine.py reads it.
//
//   struct Pool 88
//   k Plane 1 0           a field: name, type, how many of it, offset
//   op kv_append KvAppendParams
#pragma once
#include <cxxabi.h>

#include <set>
#include <string>
#include <typeinfo>

#include "../../../csrc/fields.h"

namespace inferix {

class Description {
 public:
  template <typename Params>
  Description& op(const std::string& name) {
    add<Params>();
    text_ += "op " + name + " " + name_of<Params>() + "\n";
    return *this;
  }
  const char* text() const { return text_.c_str(); }

 private:
  template <typename Type>
  static std::string name_of() {
    if constexpr (std::is_pointer_v<Type>) return "pointer";
    else if constexpr (std::is_enum_v<Type>) return name_of<std::underlying_type_t<Type>>();
    else {
      int status;
      char* const demangled = abi::__cxa_demangle(typeid(Type).name(), nullptr, nullptr, &status);
      const std::string name = demangled;
      std::free(demangled);
      return name.substr(name.rfind(':') + 1);  // npos + 1 is 0
    }
  }
  template <typename Struct>
  void add() {
    if (!known_.insert(name_of<Struct>()).second) return;
    Struct object{};
    std::string text = "struct " + name_of<Struct>() + " " + std::to_string(sizeof(Struct)) + "\n";
    each_field(object, [&](std::string_view name, auto& field) {
      using Field = std::remove_all_extents_t<std::remove_reference_t<decltype(field)>>;
      if constexpr (has_fields<Field>::value) add<Field>();
      const auto offset = reinterpret_cast<char*>(&field) - reinterpret_cast<char*>(&object);
      text += std::string(name) + " " + name_of<Field>() + " " + std::to_string(sizeof(field) / sizeof(Field)) + " " +
              std::to_string(offset) + "\n";
    });
    text_ += text;
  }

  std::set<std::string> known_;
  std::string text_;
};

}  // namespace inferix
