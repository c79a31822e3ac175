// What the launchers accept. Host code only.
#include "../../common/refusals.h"
#include "launch.h"

namespace lora_kernels::gated_activation::cuda {
namespace {

template <class Params>
const char* check_common(const Params& p) {
  if (const char* why = check_half(p.dtype)) return why;
  if (p.kind < Kind::kSilu || p.kind > Kind::kReluSquared) return "kind is unknown";
  if (p.m < 0 || p.n < 1 || p.m > kMaxExtent || p.n > kMaxExtent) return kExtent;
  if ((p.m * ((p.n + 7) / 8) + 255) / 256 > kMaxExtent) return "gate has too many elements";
  if (p.ldg < p.n || (p.up != nullptr && p.ldu < p.n)) return kStride;
  return p.m > 0 && p.gate == nullptr ? kNull : nullptr;
}

}  // namespace

const char* check(const ActivateParams& p) {
  if (const char* why = check_common(p)) return why;
  if (p.m > 0 && p.h == nullptr) return kNull;
  if (p.members < 0 || p.members > kMaxMembers) return "more than 8 members";
  int columns = 0;
  for (int j = 0; j < p.members; ++j) {
    const ShrinkMember& w = p.member[j];
    if (w.rank < 1 || w.column != columns) return "a rank is not positive or a column is wrong";
    if (w.lda < p.n) return kStride;
    if (w.a == nullptr) return kNull;
    columns += w.rank;
  }
  if (columns != p.columns || columns > kMaxShrinkColumns) return "S has more than 64 columns";
  if (p.members > 0 && p.m > 0 && p.s == nullptr) return kNull;
  return p.workspace == nullptr && activate_workspace(p) > 0 ? kNull : nullptr;
}

const char* check(const GradientParams& p) {
  if (const char* why = check_common(p)) return why;
  if (p.ldh < p.n) return kStride;
  if (p.m > 0 && (p.dh == nullptr || p.dgate == nullptr)) return kNull;
  if (p.m > 0 && p.up != nullptr && p.dup == nullptr) return kNull;
  if (p.members != 0 && p.members != (p.up == nullptr ? 1 : 2)) {
    return "there is not one adapter per operand";
  }
  int columns = 0;
  for (int j = 0; j < p.members; ++j) {
    const GradientMember& w = p.member[j];
    if (w.rank < 1 || w.rank > kMaxGradientRank) return "a rank is not in 1..32";
    if (w.column != columns) return "a column of dS is wrong";
    if (w.ldb < w.rank || (w.s != nullptr && w.lds < w.rank)) return kStride;
    if (w.b == nullptr || (w.s == nullptr) != (w.db == nullptr)) return kNull;
    columns += w.rank;
  }
  if (columns != p.columns) return "dS has another number of columns than the ranks";
  if (p.members > 0 && p.m > 0 && p.ds == nullptr) return kNull;
  return p.workspace == nullptr && gradients_workspace(p) > 0 ? kNull : nullptr;
}

}  // namespace lora_kernels::gated_activation::cuda
