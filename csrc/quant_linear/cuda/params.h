// GPU kernels of quant_linear: what the host entry hands to the launchers of launch.h.
// No torch headers; plain data, copied into the kernels' argument space.
//
// What the bytes mean: lora_kernels/ops/quant_linear/formats.py. W is [N, K] = [out, in]; all
// arithmetic of dequantization is fp32, every product rounded, then one rounding to T. Matrices are
// row-major with unit column stride; `ld*` are row strides in elements. Every pointer is a device
// pointer of the current device. Nothing allocates or synchronises.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"

namespace lora_kernels::quant_linear::cuda {

enum class Layout : int { kFlat = 0, kInt8 = 1, kFp8 = 2, kGptq = 3, kAwq = 4 };

struct QuantWeight {
  Layout layout;
  int64_t n, k;
  const void* packed;  // u8 | i8 | e4m3fn | i32

  // kFlat: element e has the scale of block e >> block_shift
  int block_shift;      // blocks of 32 and more
  int nested_shift;     // blocks of absmax likewise; 0: absmax is fp32
  const float* code;    // [16]
  const void* absmax;   // fp32, or u8 codes of nested_code
  const float* nested_absmax;
  const float* nested_code;  // [256]
  const float* offset;       // [1]

  // kInt8, kFp8: scale[n / scale_rows * scale_ld + k / scale_columns]
  const float* scale;
  int64_t scale_rows, scale_columns, scale_ld;
  float factor;  // kInt8: a second factor, 1 / 127; not used by kFp8

  // kGptq, kAwq: scales [groups, N], zeros [groups, packed_n] of eight int4
  const void* scales;
  Dtype scales_dtype;
  const int32_t* zeros;
  int64_t packed_n;
  int64_t groups;
  int64_t group;         // elements along k, where in order
  const int32_t* g_idx;  // [K] group of each k; null: k / group
  int zero_offset;       // 1: stored zeros are one too small (first GPTQ version)
};

// ---- launch_dequantize: out [N, K] of `dtype`, contiguous, any of the three -------------------
struct DequantizeParams {
  QuantWeight w;
  int64_t numel;  // N * K
  void* out;      // 16-byte aligned
  Dtype dtype;
};

// ---- launch_quantize_*: codes and statistics of contiguous finite values ----------------------
struct QuantizeFlatParams {
  const void* w;  // [numel]
  Dtype dtype;    // any of the three
  int64_t numel;  // >= 1
  int block_shift;
  float middle[15];  // between the values in ascending order
  uint64_t nibbles;  // bits 4i: nibble of the i-th value
  float least;       // smallest absmax that codes are made with
  uint8_t* packed;   // [ceil(numel / 2)]
  float* absmax;     // [blocks]
};

struct QuantizeNestedParams {
  const float* absmax;  // [blocks]
  int64_t blocks;
  int nested_shift;
  const float* code;    // [256], ascending
  const float* offset;  // [1]
  float least;
  uint8_t* codes;        // [blocks]
  float* nested_absmax;  // [ceil(blocks / nested)]
};

struct QuantizeRowsParams {
  const void* w;  // [N, K]
  Dtype dtype;    // any of the three
  int64_t n, k;   // >= 1
  int8_t* packed;
  float* scale;  // [N]
};

// ---- launch_skinny_gemm: Y = X W^T + scaled_s B^T + bias for few rows -------------------------
constexpr int64_t kMaxSkinnyRows = 128;

struct SkinnyGemmParams {
  Dtype dtype;    // T: bfloat16 or float16
  const void* x;  // [M, K] of T, 16-byte aligned rows
  int64_t ldx;
  int64_t m;
  QuantWeight w;
  const void* scaled_s;  // [M, padded rank] of T, zeros in the padding; null: no adapter
  int64_t ld_scaled;
  const void* b;  // [N, padded rank] of T, rows aligned to 4 bytes; finite in the padding
  int64_t ldb;
  int64_t padded_rank;  // multiple of 8
  const void* bias;     // [N] or null
  Dtype bias_dtype;     // any of the three
  void* y;              // [M, N] of T
  int64_t ldy;
  int sm_count;     // multiprocessors of the device; decides the split, hence the bits of Y
  int splits;       // over K; 0: chosen from N, K and sm_count, never from M
  void* workspace;  // skinny_gemm_workspace(p) bytes, 16-byte aligned; may be null when that is 0
};

}  // namespace lora_kernels::quant_linear::cuda
