/// Device-side view of the group arrays of abi.h.
#pragma once

#include <cstdint>

#include <cute/config.hpp>

#include "sm12x/abi.h"

namespace sm12x::kernel {

struct GroupArrays {
  uint8_t* base;
  int64_t padded;

  CUTE_DEVICE GroupArrays(uint64_t address, int num_groups)
      : base(reinterpret_cast<uint8_t*>(address)), padded(SM12X_GROUPS_PADDED(num_groups)) {}

  template <class Element>
  CUTE_DEVICE Element* at(int factor) const {
    return reinterpret_cast<Element*>(base + factor * padded);
  }
};

}  // namespace sm12x::kernel
