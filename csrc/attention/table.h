// Fills the Engine table of one engine type: the seam between the templates and the host entry.
#pragma once

#include "bwd.h"
#include "fwd.h"

namespace lora_kernels::attention {
namespace {

template <class E>
int64_t padded(int64_t columns) {
  return round_up(columns, E::NR);
}

template <class E>
Engine make_engine(const char* name) {
  return Engine{name,      E::BR,  E::BC,  fwd_workspace<E>, bwd_workspace<E>, bytes_of_key<E>,
                padded<E>, fwd<E>, bwd<E>, row_delta<E>,     sum_slots<E>};
}

}  // namespace
}  // namespace lora_kernels::attention
