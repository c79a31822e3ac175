// What the launchers accept. Host code only.
#include "../../common/refusals.h"
#include "launch.h"

namespace lora_kernels::lora_linear::cuda {
namespace {

const char* check_dtype(Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    return "dtype float32 is not supported; bfloat16 and float16 are (library GEMMs serve float32)";
  }
  return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16
             ? nullptr
             : "dtype is unknown; bfloat16 and float16 are supported";
}

constexpr int64_t kMaxGemmStride = int64_t{1} << 24;  // 64 rows stay within 32 bits

bool extent(int64_t value) { return value >= 0 && value <= kMaxExtent; }
const char* const kExtent = "an extent is negative or at least 2^31 - 1024";
const char* const kMembers = "the group is empty or has more than 8 members";
const char* const kRank = "a rank is not in 1..256";
const char* const kColumn = "a padded column is not a multiple of 8 or leaves its buffer";

// Columns [column, column + padded rank) of a buffer with row stride ld; ld = 0: no buffer.
const char* check_columns(int64_t rank, int64_t column, int64_t ld) {
  if (rank < 1 || rank > kMaxRank) return kRank;
  if (column < 0 || column % kRankAlign != 0) return kColumn;
  return ld > 0 && column + padded_rank(rank) > ld ? kColumn : nullptr;
}

template <class Params>
bool members_ok(const Params& p) {
  return p.members >= 1 && p.members <= kMaxGroup;
}

}  // namespace

const char* check(const PadParams& p) {
  if (const char* why = check_dtype(p.dtype)) return why;
  if (p.jobs < 0 || p.jobs > kMaxPadJobs) return "more than 24 jobs";
  for (int i = 0; i < p.jobs; ++i) {
    const PadJob& j = p.job[i];
    if (!extent(j.rows) || !extent(j.cols) || !extent(j.dst_cols)) return kExtent;
    if (j.dst_cols < j.cols || j.ld_dst < j.dst_cols) return kStride;
    if (j.rows * j.dst_cols > 0 && j.dst == nullptr) return kNull;
    if (j.rows * j.cols > 0 && j.src == nullptr) return kNull;
  }
  return nullptr;
}

const char* check(const ShrinkParams& p) {
  if (const char* why = check_dtype(p.dtype)) return why;
  if (!members_ok(p)) return kMembers;
  if (!extent(p.m) || !extent(p.k)) return kExtent;
  if (p.ldx < p.k) return kStride;
  if (p.m > 0 && p.k > 0 && p.x == nullptr) return kNull;
  for (int g = 0; g < p.members; ++g) {
    const ShrinkMember& w = p.member[g];
    const int64_t ld = p.scaled_s == nullptr ? 0 : p.ld_scaled;
    if (const char* why = check_columns(w.rank, w.padded_column, ld)) return why;
    if (w.lda < p.k) return kStride;
    if (p.s != nullptr && (w.s_column < 0 || w.s_column + w.rank > p.lds)) return kStride;
    if (p.k > 0 && w.a == nullptr) return kNull;
  }
  if (p.m > 0 && p.workspace == nullptr && shrink_workspace(p) > 0) return kNull;
  return nullptr;
}

const char* check(const DyPassParams& p) {
  if (const char* why = check_dtype(p.dtype)) return why;
  if (!members_ok(p)) return kMembers;
  if (!extent(p.m)) return kExtent;
  for (int g = 0; g < p.members; ++g) {
    const DyMember& w = p.member[g];
    if (!extent(w.n)) return kExtent;
    if (const char* why = check_columns(w.rank, w.padded_column, p.ds == nullptr ? 0 : p.ldds)) {
      return why;
    }
    if (w.lddy < w.n || (p.ds != nullptr && w.ldb < w.rank)) return kStride;
    if (w.db != nullptr && (w.lds < w.rank || w.lddb < w.rank)) return kStride;
    if (p.m == 0 || w.n == 0) continue;
    if (w.dy == nullptr || (p.ds != nullptr && w.b == nullptr)) return kNull;
    if (w.db != nullptr && w.s == nullptr) return kNull;
  }
  if (p.workspace == nullptr && dy_pass_workspace(p) > 0) return kNull;
  return nullptr;
}

const char* check(const DaParams& p) {
  if (const char* why = check_dtype(p.dtype)) return why;
  if (!members_ok(p)) return kMembers;
  if (!extent(p.m) || !extent(p.k)) return kExtent;
  if (p.ldx < p.k) return kStride;
  for (int g = 0; g < p.members; ++g) {
    const DaMember& w = p.member[g];
    if (const char* why = check_columns(w.rank, w.padded_column, p.ldds)) return why;
    if (w.da != nullptr && w.ldda < p.k) return kStride;
  }
  if (p.m > 0 && p.k > 0 && (p.x == nullptr || p.ds == nullptr)) return kNull;
  if (p.workspace == nullptr && da_workspace(p) > 0) return kNull;
  return nullptr;
}

const char* check(const GemmParams& p) {
  if (const char* why = check_dtype(p.dtype)) return why;
  if (p.problems < 1 || p.problems > kMaxGroup) return kMembers;
  if (!extent(p.m)) return kExtent;
  for (int i = 0; i < p.problems; ++i) {
    const GemmProblem& problem = p.problem[i];
    if (!extent(problem.n)) return kExtent;
    if (problem.ldc < problem.n) return kStride;
    if (problem.terms < 0 || problem.first_term < 0 ||
        problem.first_term + problem.terms > kMaxTerms) {
      return "the terms of a problem leave the list of 16";
    }
    if (p.m > 0 && problem.n > 0 && problem.c == nullptr) return kNull;
    bool base = false;
    for (int t = problem.first_term; t < problem.first_term + problem.terms; ++t) {
      const GemmTerm& term = p.term[t];
      if (!extent(term.k)) return kExtent;
      const bool masked = term.stream >= 0 && p.dropout.threshold != 0;
      if (masked && p.layout == OperandLayout::kNK) return "masked terms need the layout kKN";
      if (masked && base) return "a masked term follows one without a mask";
      base = base || !masked;
      const int64_t row_of_b = p.layout == OperandLayout::kNK ? term.k : problem.n;
      if (term.lda < term.k || term.ldb < row_of_b) return kStride;
      if (term.lda > kMaxGemmStride || term.ldb > kMaxGemmStride) {
        return "a row stride of a GEMM operand is larger than 2^24";
      }
      if (p.m > 0 && problem.n > 0 && term.k > 0 && (term.a == nullptr || term.b == nullptr)) {
        return kNull;
      }
    }
  }
  return nullptr;
}

}  // namespace lora_kernels::lora_linear::cuda
