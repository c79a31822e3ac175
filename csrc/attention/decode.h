// attention_decode on the CPU: few queries over a cache of keys and values. No torch headers.
// Formulas: lora_kernels/ops/attention/reference.py.
//
// A task is a chunk of a sequence's keys, of one key head or, where the heads of a key lie side by
// side, of all. All rows that share a head (queries x heads of the group) read its keys once, in
// blocks of kBlock, from where they lie: a block is a list of pointers, so that pages and a
// contiguous cache are one, and the lines of the next block are fetched under the products of this
// one. The result is a partial sum with its maximum and total per row; `finish` adds the chunks of a
// row in their order.
//   shapes     q [B, S, H, D]; keys [B, C, Hk, D] or pages [P, page, Hk, D]; any strides but of D
//   scores     lanes are elements of D: a sum over D is LANES sums, which a tree of shuffles joins
//              for LANES keys at once
//   values     lanes are elements of Dv, four vectors of sums for each of kRows rows
//   bytes      keys and values once from memory; q and the sums stay in L1
//   numerics   fp32 throughout, one rounding at the store; a row's chunks and blocks begin at
//              multiples of their size, so its bits depend on neither the batch nor the threads
//   limits     meant for less than about 32 rows per key head: with more, tiles do better
// Splitting of the keys: Flash-Decoding (Dao et al. 2023); pages: Kwon et al. 2023, arXiv
// 2309.06180.
#pragma once

#include "attention.h"

namespace lora_kernels::attention {

struct DecodeTask {
  int64_t b, group, groups;  // key heads [group, group + groups)
  int64_t chunk;             // keys [chunk * chunk_keys, (chunk + 1) * chunk_keys)
  int64_t slot, slot_step;   // of the first head's partial result, and on to the next head's
};

struct DecodeParams : Problem {
  const int64_t* table;  // [batch, pages] or null; k.batch and v.batch are strides of a page then
  int64_t table_row, page;
  int64_t chunk_keys;
  const DecodeTask* tasks;
  float* partial;        // [slots][rows of a group][partial_stride]: sums, maximum, total
  int64_t partial_stride;
};

struct DecodeEngine {
  int64_t (*padded)(int64_t columns);
  int64_t (*workspace)(const DecodeParams&);
  void (*chunk)(const DecodeParams&, int64_t task, void* workspace);
  // Rows of one key head of a sequence from its `count` partial results, the first in `slot`.
  void (*finish)(const DecodeParams&, int64_t b, int64_t group, int64_t slot, int64_t count);
};

const DecodeEngine* decode_avx512(Dtype);
const DecodeEngine* decode_avx2(Dtype);
const DecodeEngine* decode_baseline(Dtype);

}  // namespace lora_kernels::attention
