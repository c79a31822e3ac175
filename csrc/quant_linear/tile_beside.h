// Work for the vector units while the tile unit multiplies.
#pragma once

#include "tile_products.h"

namespace lora_kernels::quant_linear {
namespace {

// What runs under the products of one tile: after every `every`-th step one piece of the pending
// tile or of the decoder, after each some lines of what comes next and of what the decoder will read.
// Pending and Decoder have step(), of some hundred instructions; Decoder has fetch(), of one line.
template <class Pending, class Decoder>
class Beside {
 public:
  Beside(Pending& pending, Decoder& decoder, int64_t decode, int64_t steps,
         const bf16* ahead, int64_t elements)
      : pending_(pending), decoder_(decoder), decode_(decode),
        ahead_(reinterpret_cast<const char*>(ahead)),
        ahead_end_(ahead_ + elements * static_cast<int64_t>(sizeof(bf16))),
        lines_(std::min<int64_t>((elements / 32 + steps - 1) / steps, kMaxLines)) {
    fetch_ = std::min((decode * decoder.lines_of_unit() + steps - 1) / steps, kMaxLines);
    const int64_t pieces = decode + pending.steps();
    every_ = pieces == 0 ? steps + 1 : std::max<int64_t>(1, steps / pieces);
    left_ = every_;
  }
  void operator()() {
    for (int64_t i = lines_; i > 0 && ahead_ < ahead_end_; --i, ahead_ += 64) {
      _mm_prefetch(ahead_, _MM_HINT_T1);
    }
    for (int64_t i = fetch_; i > 0; --i) decoder_.fetch();
    if (--left_ > 0) return;
    left_ = every_;
    if (pending_.steps() > 0) {
      pending_.step();
    } else if (decode_ > 0) {
      --decode_;
      decoder_.step();
    }
  }
  void finish() {
    pending_.flush();
    for (; decode_ > 0; --decode_) decoder_.step();
  }

 private:
  static constexpr int64_t kMaxLines = 8;  // more a step would fill the miss buffers
  Pending& pending_;
  Decoder& decoder_;
  int64_t decode_, fetch_, every_, left_;
  const char *ahead_, *const ahead_end_;
  const int64_t lines_;
};

}  // namespace
}  // namespace lora_kernels::quant_linear
