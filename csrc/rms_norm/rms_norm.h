// rms_norm on the CPU. No torch headers. Formulas: lora_kernels/ops/rms_norm/reference.py.
//
// Forward, of a strip of rows: a row's squares are summed, then it is read again from L1, scaled and
// written; S [M, R] = Y A^T comes from the written rows, by the strip product of lora_linear's
// engine. Backward, of a row: dy and x are read for the sum over dy gain n and again for dx.
// dweight is summed per chunk of rows into a slot of its own, in blocks of kBlockRows rows.
//
// Numerics: fp32, one rounding at each store. A row is summed in 4 LK_LANES interleaved sums that
// are added in a fixed order, so its bits depend on neither the other rows nor the threads. Chunks
// depend on M alone, so dweight does not depend on the threads either.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace lora_kernels::rms_norm {

constexpr int64_t kBlockRows = 32;

struct ForwardParams {
  int64_t rows, columns;
  const void* x;  // [M, columns], rows ldx apart
  int64_t ldx;
  const float* gain;  // [columns] offset + weight; null: 1
  float eps;
  void* y;               // [M, columns]
  float* rstd;           // [M]
  const void* a_packed;  // k = columns, n = ranks, by lora_linear's engine; null: no S
  int64_t ranks;
  void* s;  // [M, ranks]
};

struct BackwardParams {
  int64_t rows, columns;
  const void *dy, *x;
  int64_t lddy, ldx;
  const float *gain, *rstd;
  void* dx;         // [M, columns]
  float* dweights;  // [chunks, columns]; null: not needed
  int64_t chunk_rows;
};

// One element type for one instruction set. All functions are safe to call concurrently.
struct Kernels {
  int strip;  // rows
  int64_t (*workspace)(const ForwardParams&);  // bytes of a thread, 0 without S
  void (*forward)(const ForwardParams&, int64_t begin, int64_t end, void* workspace);  // of strips
  // Of chunks with dweights, and then with a workspace of `columns` floats; else of rows.
  void (*backward)(const BackwardParams&, int64_t begin, int64_t end, float* workspace);
};

// Null where the compiler or the element type rules it out. Matches lora_linear's engines.
const Kernels* kernels_amx(Dtype);
const Kernels* kernels_avx512(Dtype);
const Kernels* kernels_avx2(Dtype);
const Kernels* kernels_baseline(Dtype);

}  // namespace lora_kernels::rms_norm
