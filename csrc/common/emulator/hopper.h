// What Hopper adds, in plain C++, from the PTX ISA: transaction barriers, the copy engine, products of
// a warpgroup, stmatrix. Addresses are offsets into dynamic shared memory.
//
// A copy poisons its destination when it is issued, and is carried out at a random later time. A
// product reads its operands either when it is issued or when it is waited for, whichever the seed
// says, and its accumulators are poison in between: an operand that is not there yet, one that is
// overwritten too early and an accumulator that is touched too early all show in the result.
#pragma once

#include <cstdint>

#include "warp.h"

namespace lora_kernels::emulator {

struct TensorMap {
  const unsigned char* data = nullptr;
  int64_t extent[4] = {}, stride[4] = {};  // elements of two bytes; bytes
  int box[4] = {};
};

void mbarrier_init(uint32_t barrier, uint32_t arrivals);
void mbarrier_arrive(uint32_t barrier, uint32_t bytes);  // and as many bytes more to come
void mbarrier_wait(uint32_t barrier, uint32_t parity);

// With the 128-byte swizzle.
void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, const int (&at)[4]);

// d [count]: m64, n = 2 count, k16. `a` null: A by descriptor.
struct Product {
  float* d;
  int count, accumulate;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool transposed_b;
  float (*widen)(uint16_t);
};
void wgmma(const Product& product);
void wgmma_commit();
void wgmma_wait(int pending);

void store_matrix_x4(uint32_t row_address, const uint32_t (&r)[4]);

}  // namespace lora_kernels::emulator
