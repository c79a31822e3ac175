// From the parts of a format to the Weight that kernels read.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../cpu/memory.h"
#include "quant_linear_host.h"

namespace lora_kernels::quant_linear {
namespace {

constexpr int64_t kAwqOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // column of each nibble

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_part(const at::Tensor& t, at::ScalarType dtype, int64_t numel, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.is_contiguous() && t.scalar_type() == dtype &&
                  t.numel() == numel,
              "quant_linear (cpu): part ", name, " is ", t.scalar_type(), " ", t.sizes(), " on ",
              t.device(), "; accepted: contiguous ", dtype, " of ", numel, " elements on cpu");
}

const float* floats(QuantWeight& w, const at::Tensor& t, int64_t numel, const char* name) {
  check_part(t, at::kFloat, numel, name);
  w.held.push_back(t);
  return t.const_data_ptr<float>();
}

// On large pages where it is large: a product of few rows would look up as many small ones as it
// reads.
at::Tensor zeros(int64_t numel, at::ScalarType dtype) {
  constexpr int64_t kLargePages = int64_t{4} << 20;
  const int64_t bytes = numel * static_cast<int64_t>(c10::elementSize(dtype));
  if (bytes < kLargePages) return at::zeros({numel}, dtype);
  std::shared_ptr<void> block = cpu::allocate(static_cast<size_t>(bytes));
  void* data = block.get();
  return at::from_blob(data, {numel}, [block](void*) mutable { block.reset(); },
                       at::TensorOptions().dtype(dtype))
      .zero_();
}

// gptq: word [r, n] holds columns 8r .. 8r + 7 of row n, lowest bits first.
void repack_gptq(const uint32_t* words, int64_t n, int64_t row_words, uint8_t* codes) {
  constexpr int64_t kRows = 64;
  at::parallel_for(0, ceil_div(n, kRows), 4, [&](int64_t begin, int64_t end) {
    for (int64_t n0 = begin * kRows; n0 < std::min(n, end * kRows); n0 += kRows) {
      for (int64_t r = 0; r < row_words; ++r) {
        for (int64_t i = n0; i < std::min(n, n0 + kRows); ++i) {
          const uint32_t v = words[r * n + i];
          const uint32_t swapped = (v & 0x0f0f0f0fu) << 4 | ((v >> 4) & 0x0f0f0f0fu);
          std::memcpy(codes + (i * row_words + r) * 4, &swapped, 4);
        }
      }
    }
  });
}

// awq: word [k, c] holds rows 8c + order of column k.
void repack_awq(const uint32_t* words, int64_t n, int64_t k, int64_t row_bytes, uint8_t* codes) {
  const int64_t line = ceil_div(n, 8);
  at::parallel_for(0, line, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t kk = 0; kk < k; ++kk) {
        const uint32_t v = words[kk * line + c];
        for (int64_t p = 0; p < 8; ++p) {
          const int64_t row = 8 * c + kAwqOrder[p];
          if (row >= n) continue;
          const auto nibble = static_cast<uint8_t>((v >> (4 * p)) & 15u);
          codes[row * row_bytes + kk / 2] |= static_cast<uint8_t>(kk % 2 ? nibble : nibble << 4);
        }
      }
    }
  });
}

// Columns sorted by group, each row of `codes` in that order; position: of each column. False, and
// nothing done, where groups are not as long as those of a weight without act-order.
bool sort_columns(const int32_t* group, const Weight& w, uint8_t* codes, int32_t* position,
                  int64_t* order) {
  const int64_t k = w.k, groups = w.scale_columns;
  std::vector<int64_t> next(static_cast<size_t>(groups), 0);
  for (int64_t i = 0; i < k; ++i) ++next[static_cast<size_t>(group[i])];
  for (int64_t g = 0; g < groups; ++g) {
    if (next[static_cast<size_t>(g)] != std::min(w.block, k - g * w.block)) return false;
    next[static_cast<size_t>(g)] = g * w.block;
  }
  for (int64_t i = 0; i < k; ++i) {
    const int64_t at = next[static_cast<size_t>(group[i])]++;
    position[i] = static_cast<int32_t>(at);
    order[at] = i;
  }
  at::parallel_for(0, w.n, 16, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> row(static_cast<size_t>(w.row_bytes));
    for (int64_t n = begin; n < end; ++n) {
      uint8_t* to = codes + n * w.row_bytes;
      std::copy_n(to, w.row_bytes, row.data());
      std::fill_n(to, w.row_bytes, uint8_t{0});
      for (int64_t at = 0; at < k; ++at) {
        const int64_t from = order[at];
        const int q = from % 2 ? row[static_cast<size_t>(from / 2)] & 15
                               : row[static_cast<size_t>(from / 2)] >> 4;
        to[at / 2] = static_cast<uint8_t>(to[at / 2] | (at % 2 ? q : q << 4));
      }
    }
  });
  return true;
}

void make_int4(QuantWeight& made, const std::string& layout,
               const std::vector<at::Tensor>& parts) {
  Weight& w = made.weight;
  const bool awq = layout == "awq";
  const int64_t n = w.n, k = w.k, groups = ceil_div(k, w.block), line = ceil_div(n, 8);
  check_part(parts[0], at::kInt, awq ? k * line : ceil_div(k, 8) * n, "qweight");
  check_part(parts[1], at::kInt, groups * line, "qzeros");
  TORCH_CHECK(parts[2].numel() == groups * n, "quant_linear (cpu): part scales is ",
              parts[2].sizes(), "; accepted: [", groups, ", ", n, "]");
  w.layout = Layout::kInt4;
  w.scale_columns = groups;
  w.row_bytes = ceil_div(k, 8) * 4;
  const at::Tensor codes = zeros(n * w.row_bytes + 64, at::kByte);
  auto* out = codes.mutable_data_ptr<uint8_t>();
  const auto* words = reinterpret_cast<const uint32_t*>(parts[0].const_data_ptr<int32_t>());
  if (awq) {
    repack_awq(words, n, k, w.row_bytes, out);
  } else {
    repack_gptq(words, n, w.row_bytes / 4, out);
  }
  // Read a vector past the end where K is not a whole number of groups.
  const at::Tensor scales = zeros(n * groups + 16, at::kFloat);
  const at::Tensor zero_points = zeros(n * groups + 16, at::kFloat);
  const at::Tensor given = parts[2].to(at::kFloat).contiguous();
  const float* from = given.const_data_ptr<float>();
  float* scale = scales.mutable_data_ptr<float>();
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < n; ++i) scale[i * groups + g] = from[g * n + i];
  }
  const auto* packed = reinterpret_cast<const uint32_t*>(parts[1].const_data_ptr<int32_t>());
  float* zero = zero_points.mutable_data_ptr<float>();
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < line * 8; ++i) {
      const int64_t row = awq ? i / 8 * 8 + kAwqOrder[i % 8] : i;
      if (row >= n) continue;
      const uint32_t q = (packed[g * line + i / 8] >> (4 * (i % 8))) & 15u;
      zero[row * groups + g] = static_cast<float>(q + (layout == "gptq_v1" ? 1u : 0u));
    }
  }
  w.codes = out;
  w.scale = scale;
  w.zero = zero;
  made.held = {codes, scales, zero_points};
  if (!awq) {
    check_part(parts[3], at::kInt, k, "g_idx");
    const int32_t* group = parts[3].const_data_ptr<int32_t>();
    bool ordered = true;
    for (int64_t i = 0; i < k; ++i) {
      TORCH_CHECK(group[i] >= 0 && group[i] < groups, "quant_linear (cpu): part g_idx holds ",
                  group[i], " at ", i, "; accepted: 0 to ", groups - 1);
      ordered = ordered && group[i] == i / w.block;
    }
    if (!ordered) {
      made.held.push_back(parts[3].clone());
      w.group_of = made.held.back().const_data_ptr<int32_t>();
      const at::Tensor position = at::empty({k}, at::kInt), order = at::empty({k}, at::kLong);
      if (sort_columns(w.group_of, w, out, position.mutable_data_ptr<int32_t>(),
                       order.mutable_data_ptr<int64_t>())) {
        made.held.push_back(position);
        made.order = order;
        w.position = position.const_data_ptr<int32_t>();
      }
    }
  }
  for (const at::Tensor& t : made.held) made.repacked_bytes += static_cast<int64_t>(t.nbytes());
}

}  // namespace

std::shared_ptr<QuantWeight> make_weight(const std::string& layout, int64_t n, int64_t k,
                                         int64_t block, int64_t nested_block, double factor,
                                         const std::vector<at::Tensor>& parts) {
  auto made = std::make_shared<QuantWeight>();
  Weight& w = made->weight;
  TORCH_CHECK(n > 0 && k > 0 && block > 0, "quant_linear (cpu): weight of ", n, " x ", k,
              " in blocks of ", block, "; accepted: positive numbers");
  w.n = n;
  w.k = k;
  w.block = block;
  w.factor = static_cast<float>(factor);
  const auto need = [&](size_t count) {
    TORCH_CHECK(parts.size() == count, "quant_linear (cpu): ", parts.size(), " parts of a ", layout,
                " weight; accepted: ", count);
  };
  if (layout == "flat") {
    need(nested_block > 0 ? 6 : 3);
    const int64_t blocks = ceil_div(n * k, block);
    w.layout = Layout::kFlat;
    check_part(parts[0], at::kByte, ceil_div(n * k, 2), "packed");
    made->held.push_back(parts[0]);
    w.codes = parts[0].const_data_ptr<uint8_t>();
    std::copy_n(floats(*made, parts[2], 16, "code"), 16, w.table);
    if (nested_block == 0) {
      w.scale = floats(*made, parts[1], blocks, "absmax");
    } else {
      check_part(parts[1], at::kByte, blocks, "absmax");
      made->held.push_back(parts[1]);
      w.scale_codes = parts[1].const_data_ptr<uint8_t>();
      w.nested_block = nested_block;
      w.nested_scale = floats(*made, parts[3], ceil_div(blocks, nested_block), "nested_absmax");
      w.nested_map = floats(*made, parts[4], 256, "nested_code");
      w.nested_offset = *floats(*made, parts[5], 1, "offset");
    }
  } else if (layout == "int8_row") {
    need(2);
    w.layout = Layout::kInt8;
    check_part(parts[0], at::kChar, n * k, "packed");
    made->held.push_back(parts[0]);
    w.codes = static_cast<const uint8_t*>(parts[0].const_data_ptr());
    w.scale = floats(*made, parts[1], n, "scale");
  } else if (layout == "gptq" || layout == "gptq_v1" || layout == "awq") {
    need(layout == "awq" ? 3 : 4);
    make_int4(*made, layout, parts);
  } else if (layout == "fp8_tensor" || layout == "fp8_row" || layout == "fp8_block") {
    need(2);
    w.layout = Layout::kFp8;
    check_part(parts[0], at::kFloat8_e4m3fn, n * k, "packed");
    made->held.push_back(parts[0]);
    w.codes = static_cast<const uint8_t*>(parts[0].const_data_ptr());
    w.block_rows = layout == "fp8_block" ? block : (layout == "fp8_row" ? 1 : n);
    if (layout != "fp8_block") w.block = k;
    w.scale_columns = ceil_div(k, w.block);
    w.scale = floats(*made, parts[1], ceil_div(n, w.block_rows) * w.scale_columns, "scale");
  } else {
    TORCH_CHECK(false, "quant_linear (cpu): layout '", layout,
                "' is unknown; accepted: flat, int8_row, gptq, gptq_v1, awq, fp8_tensor, fp8_row, "
                "fp8_block");
  }
  return made;
}

}  // namespace lora_kernels::quant_linear
