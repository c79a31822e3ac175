// The forward for one to four rows of X, without dropout: W is read where it lies, row by row.
// Decoding with a model does nothing else, and its time is that of reading W.
//
//   Y[j, n] = sum_k X[j, k] W[n, k] + bias[n] + scaling * sum_r S[j, r] B[n, r]
//   S[j, r] = sum_k X[j, k] A[r, k], rounded to the dtype of X before it is used
//
// Shapes: X [M, K], W [N, K], A [r, K], B [N, r], rows with unit column stride. Every thread has a
// range of the members' columns laid end to end and computes S by itself, a share of r / N of its
// work, so that nobody waits for anybody. Bytes: W, A and B once, A by each thread.
// Numerics: fp32 products and sums, one rounding of S and one of Y. The order of the sums does not
// depend on the number of rows or threads.
#pragma once

#include "../common/dtype.h"
#include "lora_linear.h"

namespace lora_kernels::lora_linear {

constexpr int64_t kFewRows = 4;

struct FewMember {
  const void* w;  // dtype of X
  int64_t ldw;
  const void *a, *b;  // dtype of X or fp32, each
  int64_t lda, ldb;
  Dtype a_dtype, b_dtype;
  const float* bias;  // or null
  void* y;            // [M, N], contiguous
  int64_t n, rank, s_column;
  float scaling;
};

struct FewParams {
  const void* x;
  int64_t ldx;
  const void* given_s;  // [M, sum of ranks], rows `lds` apart; null: S is computed
  int64_t lds;
  void* s;  // [M, sum of ranks], contiguous, by the thread that has column 0; null where S is given
  int64_t m, k, ranks;
  int members;
  FewMember member[kMaxGroup];
};

struct FewRows {
  int64_t (*workspace)(const FewParams&);  // bytes per thread
  // Columns begin to end of all members' N laid end to end.
  void (*fwd)(const FewParams&, int64_t begin, int64_t end, void* workspace);
};

const FewRows* few_rows_avx512(Dtype dtype);
const FewRows* few_rows_avx2(Dtype dtype);
const FewRows* few_rows_baseline(Dtype dtype);

}  // namespace lora_kernels::lora_linear
