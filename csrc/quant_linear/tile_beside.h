// Work for the vector units while the tile unit multiplies.
#pragma once

#include "tile_products.h"

namespace lora_kernels::quant_linear {
namespace {

// What runs under the products of one tile, in pieces of some dozen instructions after each step: a
// longer piece would leave the tile unit without work, as little more than a step of it is ahead.
// Pending and Decoder have step() and steps() or units(), Decoder has fetch(), of one line.
template <class Pending, class Decoder>
class Beside {
 public:
  Beside(Pending& pending, Decoder& decoder, int64_t decode, int64_t steps,
         const bf16* ahead, int64_t elements)
      : pending_(pending), decoder_(decoder), decode_(decode), steps_(steps),
        tail_((pending.steps() + steps - 1) / steps),
        ahead_(reinterpret_cast<const char*>(ahead)),
        ahead_end_(ahead_ + elements * static_cast<int64_t>(sizeof(bf16))),
        lines_(std::min<int64_t>((elements / 32 + steps - 1) / steps, kMaxLines)),
        fetch_(std::min((decode * decoder.lines_of_unit() + steps - 1) / steps, kMaxLines)) {}

  // Once a step: the tile of before, and an equal share of the units to decode.
  void operator()() {
    for (int64_t i = lines_; i > 0 && ahead_ < ahead_end_; --i, ahead_ += 64) {
      _mm_prefetch(ahead_, _MM_HINT_T1);
    }
    for (int64_t i = fetch_; i > 0; --i) decoder_.fetch();
    for (int64_t i = tail_; i > 0 && pending_.steps() > 0; --i) pending_.step();
    for (due_ += decode_; due_ >= steps_; due_ -= steps_) decoder_.step();
  }

 private:
  static constexpr int64_t kMaxLines = 8;  // more a step would fill the miss buffers
  Pending& pending_;
  Decoder& decoder_;
  const int64_t decode_, steps_, tail_;
  int64_t due_ = 0;
  const char *ahead_, *const ahead_end_;
  const int64_t lines_, fetch_;
};

}  // namespace
}  // namespace lora_kernels::quant_linear
