// What the launchers accept, and the launcher that picks an element type. Host code only.
#include <initializer_list>

#include "../../common/refusals.h"
#include "skinny_gemm_split.h"

namespace lora_kernels::quant_linear::cuda {
namespace {

bool multiple(int64_t value, int64_t of) { return value % of == 0; }

bool aligned(const void* data, int64_t bytes) {
  return multiple(static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)), bytes);
}

const char* check_weight(const QuantWeight& w) {
  if (w.n < 1 || w.k < 1 || w.n > kMaxExtent || w.k > kMaxExtent) return kExtent;
  if (w.packed == nullptr) return kNull;
  switch (w.layout) {
    case Layout::kFlat:
      if (w.block_shift < 5 || w.block_shift > 30) return "a block has fewer than 32 elements";
      if (w.nested_shift < 0 || w.nested_shift > 30) return "a nested block is not in 2..2^30";
      if (w.code == nullptr || w.absmax == nullptr) return kNull;
      if (w.n * w.k / 32 > kMaxExtent) return "the weight has 2^36 elements or more";
      if (w.nested_shift == 0) return nullptr;
      return w.nested_absmax == nullptr || w.nested_code == nullptr || w.offset == nullptr
                 ? kNull
                 : nullptr;
    case Layout::kInt8:
    case Layout::kFp8:
      if (w.scale_rows < 1 || w.scale_columns < 1) return "a scale serves no element";
      return w.scale == nullptr ? kNull : nullptr;
    case Layout::kGptq:
    case Layout::kAwq:
      if (w.groups < 1 || w.group < 1) return "the weight has no groups";
      if (w.packed_n != (w.n + 7) / 8) return "zeros have another number of columns than N / 8";
      if (w.g_idx == nullptr && (w.k - 1) / w.group >= w.groups) {
        return "k has more groups than there are scales";
      }
      return w.scales == nullptr || w.zeros == nullptr ? kNull : nullptr;
  }
  return "the layout is unknown";
}

// Elements along k that share a scale.
int64_t run_of(const QuantWeight& w) {
  if (w.layout == Layout::kFlat) return int64_t{1} << w.block_shift;
  return w.layout == Layout::kInt8 || w.layout == Layout::kFp8 ? w.scale_columns : w.group;
}

}  // namespace

const char* check(const DequantizeParams& p) {
  if (const char* why = check_weight(p.w)) return why;
  if (p.numel != p.w.n * p.w.k) return "numel is not N K";
  if (p.out == nullptr) return kNull;
  if (!aligned(p.out, 16)) return "the result is not aligned to 16 bytes";
  if (p.w.n > int64_t{64} * 65535 && (p.w.layout == Layout::kGptq || p.w.layout == Layout::kAwq)) {
    return "an int4 weight has more than 64 * 65535 rows";
  }
  return nullptr;
}

const char* check(const QuantizeFlatParams& p) {
  if (p.numel < 1 || p.numel / 32 > kMaxExtent) return "numel is not in 1..2^36";
  if (p.block_shift < 5 || p.block_shift > 30) return "a block has fewer than 32 elements";
  return p.w == nullptr || p.packed == nullptr || p.absmax == nullptr ? kNull : nullptr;
}

const char* check(const QuantizeNestedParams& p) {
  if (p.blocks < 1 || p.blocks > kMaxExtent) return kExtent;
  if (p.nested_shift < 1 || p.nested_shift > 30) return "a nested block is not in 2..2^30";
  return p.absmax == nullptr || p.code == nullptr || p.offset == nullptr || p.codes == nullptr ||
                 p.nested_absmax == nullptr
             ? kNull
             : nullptr;
}

const char* check(const QuantizeRowsParams& p) {
  if (p.n < 1 || p.k < 1 || p.n > kMaxExtent || p.k > kMaxExtent) return kExtent;
  return p.w == nullptr || p.packed == nullptr || p.scale == nullptr ? kNull : nullptr;
}

const char* check_low_rank(const SkinnyParams& p) {
  if (p.rank < 0 || p.rank > kMaxSkinnyRank) return "the rank is not in 0..256";
  if (p.rank == 0) return nullptr;
  for (const Factor* f : {&p.left, &p.right}) {
    if (f->data == nullptr) return kNull;
    if (f->row < 0 || f->column < 0) return "a stride of A or B is negative";
  }
  return nullptr;
}

const char* check(const SkinnyParams& p) {
  if (const char* why = check_half(p.dtype)) return why;
  if (p.m < 0 || p.m > kMaxSkinnyRows) return "the rows are not in 0..128";
  if (const char* why = check_weight(p.w)) return why;
  if (!multiple(p.w.k, 32)) return "K is no multiple of 32";
  if (run_of(p.w) < p.w.k && !multiple(run_of(p.w), 32)) {
    return "the elements along k that share a scale are no multiple of 32";
  }
  if (p.w.g_idx != nullptr) return "groups in another order than that of k are not supported";
  if (!aligned(p.w.packed, 16)) return "the packed weight is not aligned to 16 bytes";
  if (const char* why = check_low_rank(p)) return why;
  if (p.m == 0) return nullptr;
  if (p.z == nullptr || p.c == nullptr) return kNull;
  if (!aligned(p.z, 16) || !multiple(p.ldz, 8)) return "the rows of x are not aligned to 16 bytes";
  if (p.ldz < skinny_q(p)) return kStride;
  if (p.workspace == nullptr && skinny_workspace(p) > 0) return kNull;
  return nullptr;
}

size_t skinny_workspace(const SkinnyParams& p) {
  const int parts = skinny_split(p).parts;
  return parts == 1 && p.rank == 0 ? 0 : sizeof(float) * parts * p.m * (skinny_p(p) + p.rank);
}

cudaError_t launch_skinny(const SkinnyParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  if (p.m == 0) return cudaSuccess;
  return p.dtype == Dtype::kBFloat16 ? run_skinny_bf16(p, stream) : run_skinny_fp16(p, stream);
}

}  // namespace lora_kernels::quant_linear::cuda
