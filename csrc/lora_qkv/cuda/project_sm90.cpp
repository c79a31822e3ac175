// Host side of project_sm90.cuh.
#include "../../lora_linear/cuda/gemm_sm90.h"
#include "../../lora_linear/cuda/split.h"
#include "launch.h"
#include "project_sm90_params.h"

namespace lora_kernels::lora_qkv::cuda {
namespace {

constexpr int64_t kRows = 128, kColumns = 256;

int64_t count_tiles(const lora::GemmParams& p) {
  int64_t tiles = 0;
  for (int i = 0; i < p.problems; ++i) {
    tiles += lora::ceil_div(p.m, kRows) * lora::ceil_div(p.problem[i].n, kColumns);
  }
  return tiles;
}

}  // namespace

const char* check_sm90(const ProjectionParams& p) {
  if (const char* why = check(p)) return why;
  if (p.rotation.interleaved) return "pairs of neighbours are the sm_80 kernel's";
  if (p.rotation.channels != p.head_dim) return "heads rotated in part are the sm_80 kernel's";
  if (p.head_dim != 64 && p.head_dim != 128 && p.head_dim != 256) {
    return "heads of other than 64, 128 or 256 channels are the sm_80 kernel's";
  }
  return lora::check_sm90(p.gemm, lora::Sm90Config::k128x256);
}

bool worthwhile_sm90(const ProjectionParams& p) {
  return 2 * count_tiles(p.gemm) >= p.gemm.sm_count;
}

cudaError_t launch_project_sm90(const ProjectionParams& p, cudaStream_t stream) {
  if (check_sm90(p) != nullptr) return cudaErrorInvalidValue;
  ProjectSm90Args args{};
  args.rotation = p.rotation;
  args.head_dim = p.head_dim;
  lora::GemmParams gemm = p.gemm;
  int kept = 0;  // problems without columns are left out by the launcher, too
  for (int i = 0; i < gemm.problems; ++i) {
    lora::GemmProblem& problem = gemm.problem[i];
    if (problem.n == 0) continue;
    args.heads[kept++] = {problem.bias, problem.bias_dtype, static_cast<int>(problem.n),
                          p.rotated[i]};
    problem.bias = nullptr;
  }
  const lora::Sm90Config config =
      gemm.m > kRows ? lora::Sm90Config::k128x256Cluster : lora::Sm90Config::k128x256;
  const void* kernel =
      gemm.dtype == Dtype::kBFloat16 ? project_sm90_bf16() : project_sm90_fp16();
  return lora::launch_kernel_sm90(gemm, config, kernel, args.gemm, stream);
}

}  // namespace lora_kernels::lora_qkv::cuda
