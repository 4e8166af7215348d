// Prints size, alignment and the offset and size of every field of the launch structs in
// sm12x/abi.h, abi_packed.h and abi_moe.h, and the value of every SM12X_ constant, as one JSON object. The lists
// of names come from cuda/tools/sm12x_build/abi.py, which reads the headers and writes abi_names.inc:
//   STRUCT_BEGIN(name) FIELD(name, field) ... STRUCT_END(name)   CONSTANT(name)
#include <cstddef>
#include <cstdio>

#include <sm12x/abi.h>
#include <sm12x/abi_moe.h>
#include <sm12x/abi_packed.h>

namespace {

bool first_struct = true;
bool first_field = true;
bool first_constant = true;

char const* separator(bool& first) {
  char const* text = first ? "\n" : ",\n";
  first = false;
  return text;
}

void print_structs() {
#define STRUCT_BEGIN(name)                                                                        \
  std::printf("%s\"%s\": {\"size\": %zu, \"align\": %zu, \"fields\": {", separator(first_struct), \
              #name, sizeof(name), alignof(name));                                                \
  first_field = true;
#define FIELD(name, field)                                                                   \
  std::printf("%s\"%s\": [%zu, %zu]", separator(first_field), #field, offsetof(name, field), \
              sizeof(static_cast<name*>(nullptr)->field));
#define STRUCT_END(name) std::printf("}}");
#define CONSTANT(name)
#include "abi_names.inc"
#undef STRUCT_BEGIN
#undef FIELD
#undef STRUCT_END
#undef CONSTANT
}

void print_constants() {
#define STRUCT_BEGIN(name)
#define FIELD(name, field)
#define STRUCT_END(name)
#define CONSTANT(name) \
  std::printf("%s\"%s\": %lld", separator(first_constant), #name, static_cast<long long>(name));
#include "abi_names.inc"
}

}  // namespace

int main() {
  std::printf("{\"structs\": {");
  print_structs();
  std::printf("},\n\"constants\": {");
  print_constants();
  std::printf("}}\n");
  return 0;
}
