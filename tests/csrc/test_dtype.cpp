// Conversions over all 65536 bit patterns, and rounding to nearest even at every boundary.
#include "common/dtype.h"

#include <cmath>

#include "check.h"

using namespace lora_kernels;

template <class H>
void round_trip(const char* name) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    H half{static_cast<uint16_t>(bits)};
    const float value = to_float(half);
    H back;
    from_float(value, back);
    if (std::isnan(value)) {
      CHECK(std::isnan(to_float(back)), "%s NaN %04x became %04x", name, bits, back.bits);
    } else {
      CHECK(back.bits == bits, "%s %04x became %04x", name, bits, back.bits);
    }
  }
}

// Between neighbours: below the middle down, above it up, the middle to the even one.
template <class H>
void nearest_even(const char* name, uint32_t last_finite) {
  for (uint32_t bits = 0; bits < last_finite; ++bits) {
    const float low = to_float(H{static_cast<uint16_t>(bits)});
    const float high = to_float(H{static_cast<uint16_t>(bits + 1)});
    const float middle = static_cast<float>((static_cast<double>(low) + high) / 2);
    const auto rounds_to = [&](float v) {
      H h;
      from_float(v, h);
      return static_cast<uint32_t>(h.bits);
    };
    const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
    CHECK(rounds_to(middle) == even, "%s middle after %04x gives %04x", name, bits,
          rounds_to(middle));
    CHECK(rounds_to(std::nextafter(middle, low)) == bits, "%s below middle after %04x", name, bits);
    CHECK(rounds_to(std::nextafter(middle, high)) == bits + 1, "%s above middle after %04x", name,
          bits);
    CHECK(rounds_to(-std::nextafter(middle, high)) == ((bits + 1) | 0x8000u),
          "%s negative above middle after %04x", name, bits);
  }
}

int main() {
  round_trip<bf16>("bf16");
  round_trip<fp16>("fp16");
  nearest_even<bf16>("bf16", 0x7f7f);
  nearest_even<fp16>("fp16", 0x7bff);
  fp16 h;
  from_float(65519.0f, h);
  CHECK(h.bits == 0x7bff, "65519 gives %04x", h.bits);
  from_float(65520.0f, h);
  CHECK(h.bits == 0x7c00, "65520 gives %04x", h.bits);
  return finish("dtype");
}
