// CPU kernels of quant_linear: what the host entry hands to the per-ISA objects. No torch headers.
//
// Formats: lora_kernels/ops/quant_linear/formats.py. Formulas: reference.py beside it. Matrices are
// row-major with unit column stride; `ld*` are row strides in elements.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/philox.h"

namespace lora_kernels::quant_linear {

// kFlat: nf4, fp4. kInt4: gptq and awq, repacked (quant_weight.cpp). Element 2i of a row (kFlat: of
// the flattened tensor) is the high nibble of byte i.
enum class Layout : int { kFlat, kInt4, kInt8, kFp8 };

// A quantized [n, k] weight.
struct Weight {
  Layout layout;
  int64_t n, k;
  const uint8_t* codes;    // kFlat: ceil(n k / 2); kInt4: n rows of row_bytes; else n x k
  int64_t row_bytes;       // kInt4
  int64_t block;           // elements (kFlat), columns (kInt4, kFp8) that share a scale
  int64_t block_rows;      // kFp8: rows that share a scale
  int64_t scale_columns;   // kInt4, kFp8: scales of a row
  float table[16];         // kFlat: value of each code
  const float* scale;      // kFlat: [blocks], null when nested; kInt4, kFp8: [., scale_columns];
                           // kInt8: [n]
  const float* zero;       // kInt4: [n, scale_columns]
  const int32_t* group_of; // kInt4: group of each column; null: column / block
  const int32_t* position; // kInt4: where a column is in its row of codes; null: in its place
  const uint8_t* scale_codes;  // kFlat, nested statistics: scale = map[code] * nested + offset
  const float* nested_scale;
  const float* nested_map;
  float nested_offset;
  int64_t nested_block;
  float factor;  // kInt8: W = (q * scale) * factor
};

// One small operand of the adapter: fp32 or the dtype of x.
struct Adapter {
  const void* data;
  int64_t ld;
  Dtype dtype;
};

// Y = X W^T + bias + scaling * S B^T, S = drop(X) A^T; rank 0: no adapter.
struct FwdParams {
  const Weight* weight;
  Dtype dtype;    // of x, y, s
  const void* x;  // [m, k]
  int64_t ldx;
  int64_t m;
  const float* bias;  // [n] or null
  void* y;            // [m, n]
  int64_t ldy;
  int64_t rank;
  Adapter a;  // [rank, k]
  Adapter b;  // [n, rank]
  void* s;    // [m, rank]
  int64_t lds;
  float scaling;
  float keep_scale;  // 1 / P(keep)
  DropoutParams dropout;
  int64_t row0;  // of x in the dropout's numbering
};

// dX = dY W + (dS A) * D, dS = scaling * keep_scale * dY B, dA = dS^T (X * D), dB = s dY^T S; rank
// 0: no adapter. What is null is not needed.
struct BwdParams {
  const Weight* weight;
  Dtype dtype;     // of dy, x, s, dx
  const void* dy;  // [m, n]
  int64_t lddy;
  const void* x;  // [m, k]; for dA
  int64_t ldx;
  const void* s;  // [m, rank]; for dB
  int64_t lds;
  int64_t m;
  void* dx;  // [m, k]
  int64_t lddx;
  int64_t rank;
  Adapter a;
  Adapter b;
  float* da;  // partial dA of each thread, [threads, rank_padded, k_padded], added to
  float* db;  // partial (dB / s)^T of each thread, [threads, rank_padded, n_padded], added to
  float scaling;
  float keep_scale;
  DropoutParams dropout;
  int64_t row0;
};

// A computation of several phases: all threads finish one before any starts the next. `shared` is
// one block for all threads, `own` one per thread. Every row of a result is independent of the
// number of threads and of the other rows; sums over rows are per thread.
template <class Params>
struct Job {
  int phases;
  int64_t (*shared_bytes)(const Params&);
  int64_t (*own_bytes)(const Params&);
  void (*run)(const Params&, int phase, int thread, int threads, void* shared, void* own);
};

struct QuantizeFlatParams {
  Dtype dtype;
  const void* w;  // [n] elements
  int64_t n;
  int64_t block;
  float midpoint[15];  // between neighbours of the sorted table
  uint8_t code[16];    // of the sorted table
  float min_absmax;
  uint8_t* codes;  // ceil(n / 2)
  float* absmax;   // ceil(n / block)
};

struct QuantizeRowsParams {
  Dtype dtype;
  const void* w;  // [n, k]
  int64_t n, k;
  int8_t* codes;
  float* scale;  // [n]
};

// Kernels compiled for one instruction set.
struct Kernels {
  const char* name;
  // Elements [begin, end) of the flattened W; begin is even.
  void (*dequantize)(const Weight&, Dtype, void* dst, int64_t begin, int64_t end, bool stream);
  void (*quantize_flat)(const QuantizeFlatParams&, int64_t first_block, int64_t last_block);
  void (*quantize_rows)(const QuantizeRowsParams&, int64_t first_row, int64_t last_row);
  Job<FwdParams> fwd;
  Job<BwdParams> bwd;
  int rank_multiple;    // rank_padded: rank to a multiple of this
  int column_multiple;  // k_padded, n_padded
};

// Null where the compiler or the element type rules the kernels out.
const Kernels* kernels_amx(Dtype);
const Kernels* kernels_avx512(Dtype);
const Kernels* kernels_avx2(Dtype);
const Kernels* kernels_baseline(Dtype);

}  // namespace lora_kernels::quant_linear
