// Operands and dropout as the kernels want them, from tensors; S of rows that are in memory. Host
// code of the entries.
#pragma once

#include <optional>
#include <vector>

#include "../../common/stable_torch.h"
#include "launch.h"

namespace lora_kernels::lora_linear::cuda {

inline Dropout make_dropout(int64_t threshold, const std::optional<stable::Tensor>& seed) {
  Dropout dropout{};
  if (threshold == 0) return dropout;
  if (threshold < 0 || threshold > 65536) stable::fail("threshold is not in 0..65536");
  if (!seed.has_value() || seed->scalar_type() != stable::ScalarType::Long ||
      !stable::on_device(*seed) || seed->numel() != 1) {
    stable::fail("dropout needs a seed: one int64 on the device of x");
  }
  dropout.threshold = static_cast<uint32_t>(threshold);
  dropout.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  return dropout;
}

// An operand as the kernels want it: of dtype T, 16-byte aligned rows.
struct Operand {
  const void* data;
  int64_t ld;
};

// Copies of small operands that have another dtype or odd rows, made by one launch.
class Pads {
 public:
  Pads(const stable::Tensor& x, Dtype dtype) : x_(x) {
    params_.dtype = dtype;
    params_.jobs = 0;
  }

  // `columns` of `m` from column `first` on; aligned rows are asked for, the kernels take any.
  // `padded`: columns up to a multiple of 8 are read, those behind the last one have to be zero.
  Operand add(const stable::Matrix& m, int64_t first, int64_t columns, bool padded = false) {
    const Dtype dtype = stable::dtype_of(m.tensor, "an adapter");
    const size_t element = dtype == Dtype::kFloat32 ? 4 : 2;
    const void* data = static_cast<const char*>(m.data) + first * static_cast<int64_t>(element);
    const bool whole = !padded || columns % kRankAlign == 0;
    if (dtype == params_.dtype && aligned16(data, m.ld) && whole) return {data, m.ld};
    const int64_t ld = padded_rank(columns);
    copies_.push_back(stable::empty(x_, {m.rows, ld}));
    void* dst = copies_.back().mutable_data_ptr();
    copy(m, first, columns, 1.0f, dst, ld);
    return {dst, ld};
  }

  // scale * those columns into dst, row stride ld; zeros up to a multiple of 8 columns.
  void copy(const stable::Matrix& m, int64_t first, int64_t columns, float scale, void* dst,
            int64_t ld) {
    if (params_.jobs >= kMaxPadJobs) stable::fail("too many operands to copy");
    const Dtype dtype = stable::dtype_of(m.tensor, "an adapter");
    const int64_t element = dtype == Dtype::kFloat32 ? 4 : 2;
    params_.job[params_.jobs++] = {static_cast<const char*>(m.data) + first * element,
                                   dtype,
                                   m.ld,
                                   1,
                                   m.rows,
                                   columns,
                                   dst,
                                   ld,
                                   padded_rank(columns),
                                   scale};
  }

  void launch(cudaStream_t stream) {
    if (params_.jobs == 0) return;
    if (const char* why = check(params_)) stable::fail(why);
    stable::check_launch(launch_pad(params_, stream), "pad");
  }

 private:
  stable::Tensor x_;
  std::vector<stable::Tensor> copies_;
  PadParams params_;
};

// S = x [a_0; a_1; ..]^T for an op whose own pass makes S of few ranks only. x and s are contiguous.
inline void shrink_rows(const stable::Tensor& x, Dtype dtype, const std::vector<stable::Matrix>& a,
                        const std::vector<Operand>& operands, stable::Tensor& s,
                        const stable::Place& place) {
  ShrinkParams p{};
  p.dtype = dtype;
  p.x = x.const_data_ptr();
  p.m = x.size(0);
  p.ldx = p.k = x.size(1);
  p.members = static_cast<int>(a.size());
  int64_t column = 0, padded = 0;
  for (size_t j = 0; j < a.size(); ++j) {
    p.member[j] = {operands[j].data, operands[j].ld, a[j].rows, column, padded, 1.0f};
    column += a[j].rows;
    padded += padded_rank(a[j].rows);
  }
  p.s = s.mutable_data_ptr();
  p.lds = column;
  p.keep_scale = 1.0f;
  p.sm_count = place.sm_count;
  stable::Tensor space = stable::workspace(x, shrink_workspace(p));
  p.workspace = space.mutable_data_ptr();
  if (const char* why = check(p)) stable::fail(why);
  stable::check_launch(launch_shrink(p, place.stream), "shrink");
}

}  // namespace lora_kernels::lora_linear::cuda
