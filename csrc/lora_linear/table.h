// Fills the Engine table of one engine type: the seam between the templates and the host entry.
#pragma once

#include "bwd.h"
#include "fwd.h"

namespace lora_kernels::lora_linear {
namespace {

template <class E, class Src>
void pack_b(bool columns, const Src* src, int64_t ld, int64_t k, int64_t n, typename E::TB* dst,
            int part, int parts) {
  const int64_t kp = round_up(k, E::KR);
  const Range own = share((n + E::NR - 1) / E::NR, part, parts);
  for (int64_t j = own.begin; j < own.end; ++j) {
    const int64_t n0 = j * E::NR, valid = std::min<int64_t>(E::NR, n - n0);
    const int64_t width = strip_width<E>(n, n0);
    if (columns) {
      E::template pack_b_cols<Src>(src + n0 * ld, ld, k, valid, width, dst + n0 * kp);
    } else {
      E::template pack_b_rows<Src>(src + n0, ld, k, valid, width, nullptr, 0, 0, dst + n0 * kp);
    }
  }
}

// A packed operand takes the engine's element type or, for weights kept in fp32, fp32.
template <class E, bool kColumns>
void pack_b_any(Dtype dtype, const void* src, int64_t ld, int64_t k, int64_t n, void* dst, int part,
                int parts) {
  auto* out = static_cast<typename E::TB*>(dst);
  if (dtype == Dtype::kFloat32) {
    pack_b<E>(kColumns, static_cast<const float*>(src), ld, k, n, out, part, parts);
  } else {
    pack_b<E>(kColumns, static_cast<const typename E::T*>(src), ld, k, n, out, part, parts);
  }
}

template <class E>
int64_t fwd_workspace(const FwdParams& p, Grid grid) {
  Arena arena(nullptr);
  FwdBuffers<E>(p, strips_per_thread<E>(p.m, grid), arena);
  return arena.used();
}

template <class E>
int64_t bwd_workspace(const BwdParams& p, Grid grid) {
  Arena arena(nullptr);
  BwdBuffers<E>(p, strips_per_thread<E>(p.m, grid), arena);
  return arena.used();
}

template <class E>
Engine make_engine(const char* name) {
  return Engine{name,
                E::MR,
                E::NR,
                E::KR,
                E::NV,
                static_cast<int>(sizeof(typename E::TB)),
                pack_b_any<E, true>,
                pack_b_any<E, false>,
                fwd_workspace<E>,
                bwd_workspace<E>,
                fwd<E>,
                bwd<E>};
}

}  // namespace
}  // namespace lora_kernels::lora_linear
