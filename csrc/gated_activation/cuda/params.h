// Arguments of the GPU kernels of gated_activation. POD, torch-free.
//
// T is the 16-bit dtype of gate, up, h and their gradients. Matrices have unit column stride; where
// every base and row is a multiple of 16 bytes the kernels move 16 bytes at a time, elsewhere single
// elements.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"

namespace lora_kernels::gated_activation::cuda {

enum class Kind : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kReluSquared = 4 };

constexpr int kMaxMembers = 8;
constexpr int kMaxShrinkColumns = 64;  // sum of ranks that the forward makes S of
constexpr int kMaxGradientRank = 32;   // ranks that the backward makes dS and dB of

struct ShrinkMember {
  const void* a;  // [rank, N] of T
  int64_t lda;
  int rank, column;  // first column in S
};

struct ActivateParams {
  Dtype dtype;
  Kind kind;
  int64_t m, n;
  const void *gate, *up;  // up null: h = act(gate)
  int64_t ldg, ldu;
  void* h;      // [M, N] contiguous
  int members;  // 0: no S
  ShrinkMember member[kMaxMembers];
  void* s;      // [M, columns] contiguous
  int columns;  // sum of ranks
  int sm_count, splits;  // splits of N; 0: chosen
  void* workspace;       // activate_workspace(p) bytes
};

struct GradientMember {  // 0: of gate, 1: of up
  const void* b;         // [N, rank] of T
  int64_t ldb;
  const void* s;  // [M, rank] of T; null: no dB
  int64_t lds;
  int rank, column;  // first column in dS
  float scaling;
  void* db;  // [N, rank] contiguous
  Dtype db_dtype;
};

struct GradientParams {
  Dtype dtype;
  Kind kind;
  int64_t m, n;
  const void *dh, *gate, *up;
  int64_t ldh, ldg, ldu;
  void *dgate, *dup;  // [M, N] contiguous
  int members;        // 0: no dS and dB; else one per operand
  GradientMember member[2];
  void* ds;     // [M, columns] contiguous
  int columns;  // sum of ranks
  int sm_count, splits;  // splits of M; 0: chosen
  void* workspace;       // gradients_workspace(p) bytes
};

}  // namespace lora_kernels::gated_activation::cuda
