// What the launchers accept. Host code only.
#include "../../common/refusals.h"
#include "launch.h"

namespace lora_kernels::attention::cuda {
namespace {

constexpr int kMaxExtent = 1 << 30;
constexpr int kMaxGridY = 65535;

template <class Tensor>
bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch % 8 == 0 && t.row % 8 == 0 &&
         t.head % 8 == 0;
}

const char* const kAlignment = "a pointer or stride is no multiple of 16 bytes";

const char* check_problem(const AttentionParams& p) {
  if (const char* why = check_half(p.dtype)) return why;
  if (p.head_dim != 64 && p.head_dim != 128) {
    return "the head size is not supported; 64 and 128 are";
  }
  if (p.batch < 0 || p.rows < 0 || p.keys < 0 || p.batch > kMaxExtent || p.rows > kMaxExtent ||
      p.keys > kMaxExtent) {
    return "an extent is negative or too large";
  }
  if (p.kv_heads < 1 || p.heads < 1 || p.heads > kMaxGridY || p.heads % p.kv_heads != 0) {
    return "the number of heads is no multiple of the number of key heads, or above 65535";
  }
  if (p.left < -1 || p.right < -1) return "a side of the window is below -1";
  if ((p.cu_rows == nullptr) != (p.cu_keys == nullptr)) return kNull;
  if (p.drop_threshold > 65536) return "the threshold is not in 0..65536";
  if (p.drop_threshold != 0 && p.seed == nullptr) return kNull;
  if (!aligned(p.q) || !aligned(p.k) || !aligned(p.v)) return kAlignment;
  const bool some = p.batch > 0 && p.rows > 0 && p.keys > 0;
  if (some && (p.q.data == nullptr || p.k.data == nullptr || p.v.data == nullptr)) return kNull;
  return nullptr;
}

}  // namespace

const char* check(const ForwardParams& p) {
  if (const char* why = check_problem(p.a)) return why;
  if (!aligned(p.out)) return kAlignment;
  if (p.a.batch > 0 && p.a.rows > 0 && (p.out.data == nullptr || p.lse == nullptr)) return kNull;
  return nullptr;
}

const char* check(const BackwardParams& p) {
  if (const char* why = check_problem(p.a)) return why;
  if (!aligned(p.out) || !aligned(p.dout) || !aligned(p.dq) || !aligned(p.dk) || !aligned(p.dv)) {
    return kAlignment;
  }
  if ((p.dk.data == nullptr) != (p.dv.data == nullptr)) return kNull;
  if (p.dsinks != nullptr && p.a.sinks == nullptr) return kNull;
  if (p.a.batch > 0 && p.a.rows > 0 &&
      (p.out.data == nullptr || p.dout.data == nullptr || p.lse == nullptr || p.delta == nullptr)) {
    return kNull;
  }
  return nullptr;
}

}  // namespace lora_kernels::attention::cuda
