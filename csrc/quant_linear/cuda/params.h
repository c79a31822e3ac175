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
#include "../../lora_linear/cuda/params.h"

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

// ---- launch_skinny: products of few rows with a packed weight, and a low-rank term ------------
//   forward   C = X W^T + scale U B^T + bias       U = u_scale drop(X) A^T
//   dgrad     C = dY W  + drop(scale U A)          U = u_scale dY B
// Both are C [M, P] from Z [M, Q], left [rank, Q] and right [rank, P]: A and B^T, or B^T and A.
constexpr int64_t kMaxSkinnyRows = 128;
constexpr int64_t kMaxSkinnyRank = 256;

// A small matrix of any dtype and strides (elements); rounded to T as it is read.
struct Factor {
  const void* data;
  Dtype dtype;
  int64_t row, column;
};

struct SkinnyParams {
  Dtype dtype;    // T: bfloat16 or float16
  bool dgrad;     // P = in_features, Q = out_features; else the other way round
  const void* z;  // [M, Q] of T, 16-byte aligned rows, zeros up to the next multiple of 8 columns
  int64_t ldz;
  int64_t m;
  QuantWeight w;
  int64_t rank;        // 0: no low-rank term
  Factor left, right;  // [rank, Q], [rank, P]
  float u_scale, scale;
  lora_linear::cuda::Dropout dropout;  // of Z before `left`; dgrad: of the term's columns
  void* u;                             // [M, rank] of T; null: not wanted
  const void* bias;                    // [P] or null
  Dtype bias_dtype;                    // any of the three
  void* c;                             // [M, P] of T, contiguous
  int sm_count;     // multiprocessors of the device; decides the split, hence the bits of C
  int splits;       // over Q; 0: chosen from P, Q, rank and sm_count, never from M
  void* workspace;  // skinny_workspace(p) bytes, 16-byte aligned; may be null when that is 0
};

}  // namespace lora_kernels::quant_linear::cuda
