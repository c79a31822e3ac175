// attention on the CPU: parameters and the engines that the instruction sets compile. No torch
// headers. Formulas: lora_kernels/ops/attention/reference.py.
//
// Both directions work on blocks of queries x keys whose scores live in L1 and L2 and nowhere else
// (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv
// 2205.14135). A task owns what it writes, so no sum depends on which thread runs it:
//   forward   a key head of a sequence, and a chunk of rows: packs the keys that these rows see,
//             then finishes the rows of all its query heads block by block
//   backward  a key head of a sequence, and a chunk of keys: dK and dV of these keys stay in fp32
//             while all rows of all its query heads pass by; with several chunks dQ is a sum of
//             fp32 slots, added in the order of the chunks
// Blocks that causal or the window exclude are not visited; edges are cut by row.
// Bytes moved: operands once per task and direction, results once; scores never.
// Numerics: fp32 sums and softmax; the AMX engine rounds P and dS to bf16 as operands of the next
// product; one rounding at the store.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/philox.h"

namespace lora_kernels::attention {

// Element (b, s, head, d) of a tensor is data[b * batch + s * row + head * head_stride + d].
struct Rows {
  void* data;
  int64_t batch, row, head;
};

// One sequence: its first row of q and of k in the tensors, how many there are, and its first row
// among all rows of the batch.
struct Sequence {
  int64_t row, rows, key, keys, slot;
};

namespace {  // compiled once per instruction set

struct Range {
  int64_t begin, end;
  bool empty() const { return end <= begin; }
};

// Keys that row i of a sequence sees, `left` and `right` of it or unlimited (-1); the last row stands
// at the last key. Both ends rise with i.
inline Range seen_keys(const Sequence& s, int64_t left, int64_t right, int64_t i) {
  const int64_t at = i + s.keys - s.rows, high = at + right + 1;
  Range seen{left < 0 || at < left ? 0 : at - left, s.keys};
  if (right >= 0 && high < s.keys) seen.end = high < 0 ? 0 : high;
  return seen;
}

}  // namespace

enum class MaskKind : int { kNone, kBool, kFloat32, kBFloat16, kFloat16 };
struct Mask {
  const void* data;
  MaskKind kind;
  int64_t batch, head, row, key;  // strides, 0 where broadcast
};

// Of [B, H, S] values, or [H, T].
struct RowValues {
  float* data;
  int64_t batch, head;
};

struct Problem {
  int64_t batch, heads, groups, d, dv;
  const Sequence* sequences;
  Rows q, k, v, out;
  RowValues lse;
  float scale, softcap;  // softcap 0: none
  int64_t left, right;   // -1: unlimited
  const float* sinks;    // [heads] or null
  const float* slopes;   // [batch or 1, heads] or null
  int64_t slopes_batch;
  Mask mask;
  DropoutParams dropout;
  float keep_scale;
};

struct FwdParams : Problem {
  int64_t chunks;  // of rows, per key head of a sequence
};

struct BwdParams : Problem {
  Rows dout, dq, dk, dv_out;   // dq, dk, dv_out: null data where not needed
  RowValues dlse;              // null: none
  RowValues delta;
  float* dq_slots;             // [chunks][heads][all rows][d padded]; null: dq is stored
  int64_t all_rows, slot_stride;
  float* dmask;                // null: not needed; strides as those of the mask
  int64_t dmask_batch, dmask_head, dmask_row, dmask_key;
  int64_t chunks;              // of keys, per key head of a sequence
  int64_t passes;              // parts of a chunk that fit the cache one after the other
  bool join_batch, join_heads; // a task takes every sequence, every head: its mask is shared
};

struct Engine {
  const char* name;
  int rows, keys;  // of a block
  int64_t (*fwd_workspace)(const FwdParams&);
  int64_t (*bwd_workspace)(const BwdParams&);
  int64_t (*bytes_of_key)(int64_t d, int64_t dv);  // of the backward's buffers
  int64_t (*padded)(int64_t columns);
  void (*fwd)(const FwdParams&, int64_t task, void* workspace);
  void (*bwd)(const BwdParams&, int64_t task, void* workspace);
  void (*row_delta)(const BwdParams&, int64_t b, int64_t row, int64_t h);
  void (*sum_slots)(const BwdParams&, int64_t b, int64_t i, int64_t h);
};

const Engine* engine_amx(Dtype);
const Engine* engine_avx512(Dtype);
const Engine* engine_avx2(Dtype);
const Engine* engine_baseline(Dtype);

}  // namespace lora_kernels::attention
