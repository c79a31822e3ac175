// Host side of forward_sm90.h: what it accepts, tensor maps, launch.
#include "forward_sm90.h"

#include <cstring>

#include "forward_sm90_params.h"
#include "forward_sm90_schedule.h"

namespace lora_kernels::attention::cuda {
namespace {

struct Extents {
  int64_t rows, heads, batch;
};

// Strides of dimensions of extent 1 are never used, but have to be valid.
int64_t stride_or(int64_t stride, int64_t extent, int64_t instead) {
  return extent > 1 ? stride : instead;
}

// Strides in bytes are multiples of 16 below 2^40; 0 would read one row over and over.
bool describable(const Strided& t, const Extents& e) {
  const struct {
    int64_t stride, extent;
  } dimensions[] = {{t.row, e.rows}, {t.head, e.heads}, {t.batch, e.batch}};
  for (const auto& d : dimensions) {
    if (d.extent > 1 && (d.stride <= 0 || d.stride >= int64_t{1} << 39)) return false;
  }
  return true;
}

// [batch, rows, heads, D], copied in boxes of 128 rows and 64 columns.
cudaError_t encode(TensorMap* map, const AttentionParams& p, const Strided& t, const Extents& e) {
  static_assert(kSm90Rows == kSm90Keys);
  return encode_tensor_map(map, p.dtype,
                           {t.data,
                            {p.head_dim, e.rows, e.heads, e.batch},
                            {2 * stride_or(t.row, e.rows, p.head_dim),
                             2 * stride_or(t.head, e.heads, p.head_dim),
                             2 * stride_or(t.batch, e.batch, p.head_dim)},
                            {kTileColumns, kSm90Keys, 1, 1}});
}

Extents queries_of(const AttentionParams& p) {
  return {p.rows, p.heads, p.cu_rows == nullptr ? p.batch : 1};
}
Extents keys_of(const AttentionParams& p) {
  return {p.keys, p.kv_heads, p.cu_rows == nullptr ? p.batch : 1};
}

}  // namespace

const char* check_forward_sm90(const ForwardParams& f) {
  if (const char* why = check(f)) return why;
  const AttentionParams& p = f.a;
  if (p.softcap != 0.0f || p.slopes != nullptr || p.drop_threshold != 0) {
    return "softcap, ALiBi and dropout are not in the sm_90a kernel";
  }
  if (!(p.scale > 0.0f)) return "the sm_90a kernel wants a scale above 0";
  if (p.keys == 0) return "the sm_90a kernel wants keys";
  if (!describable(p.q, queries_of(p)) || !describable(p.k, keys_of(p)) ||
      !describable(p.v, keys_of(p))) {
    return "an operand is expanded (a stride of 0), which the copy engine does not read";
  }
  return nullptr;
}

cudaError_t launch_forward_sm90(const ForwardParams& f, cudaStream_t stream) {
  if (check_forward_sm90(f) != nullptr) return cudaErrorInvalidValue;
  const AttentionParams& p = f.a;
  if (p.batch == 0 || p.rows == 0) return cudaSuccess;
  Sm90ForwardParams q;
  std::memset(static_cast<void*>(&q), 0, sizeof q);
  q.f = f;
  cudaError_t error = encode(&q.q, p, p.q, queries_of(p));
  if (error == cudaSuccess) error = encode(&q.k, p, p.k, keys_of(p));
  if (error == cudaSuccess) error = encode(&q.v, p, p.v, keys_of(p));
  if (error != cudaSuccess) return error;
  return p.dtype == Dtype::kBFloat16 ? run_forward_sm90_bf16(q, stream)
                                     : run_forward_sm90_fp16(q, stream);
}

}  // namespace lora_kernels::attention::cuda
