// Host side of gemm_sm90.h: what it accepts, tensor maps, tile shape, launch.
#include "gemm_sm90.h"

#include <atomic>
#include <cstring>

#include "gemm_sm90_kernels.h"
#include "gemm_sm90_params.h"
#include "gemm_sm90_schedule.h"
#include "launch.h"

namespace lora_kernels::lora_linear::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Through the runtime, so that nothing links against the driver library.
Encode find_encode() {
  static std::atomic<Encode> found{nullptr};
  Encode encode = found.load(std::memory_order_acquire);
  if (encode != nullptr) return encode;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult status{};
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                       &status) != cudaSuccess ||
      status != cudaDriverEntryPointSuccess || entry == nullptr) {
    return nullptr;
  }
  encode = reinterpret_cast<Encode>(entry);
  found.store(encode, std::memory_order_release);
  return encode;
}

// A row-major matrix, copied in boxes of 64 columns with the 128-byte swizzle.
bool encode_matrix(Encode encode, CUtensorMap* map, Dtype dtype, const void* data, int64_t rows,
                   int64_t columns, int64_t ld, int box_rows) {
  const cuuint64_t extents[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(ld) * 2};
  const cuuint32_t box[2] = {kTileColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapDataType type = dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 2, const_cast<void*>(data), extents, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The most masked terms that a problem has.
Sm90Masks masks_of(const GemmParams& p) {
  if (p.dropout.threshold == 0) return kNoMask;
  int most = 0;
  for (int i = 0; i < p.problems; ++i) {
    const GemmProblem& problem = p.problem[i];
    int count = 0;
    for (int t = problem.first_term; t < problem.first_term + problem.terms; ++t) {
      count += p.term[t].stream >= 0;
    }
    most = count > most ? count : most;
  }
  return most == 0 ? kNoMask : most == 1 ? kOneMask : kSeveralMasks;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t count_tiles(const GemmParams& p, int block_n) {
  int64_t columns = 0;
  for (int i = 0; i < p.problems; ++i) columns += ceil_div(p.problem[i].n, block_n);
  return columns * ceil_div(p.m, kSm90BlockM);
}

struct Shape {
  int block_n;
  int cluster;
};

Shape shape_of(Sm90Config config) {
  switch (config) {
    case Sm90Config::k128x256Cluster:
      return {256, 2};
    case Sm90Config::k128x256:
      return {256, 1};
    case Sm90Config::k128x128Cluster:
      return {128, 2};
    default:
      return {128, 1};
  }
}

}  // namespace

const char* check_sm90(const GemmParams& p, Sm90Config config) {
  if (const char* why = check(p)) return why;
  if (p.sm_count < 1) return "the number of multiprocessors is not given";
  const bool transposed = p.layout == OperandLayout::kKN;
  if (masks_of(p) != kNoMask && !transposed)
    return "masked terms are supported where B is [k, N] only";
  if (config != Sm90Config::kChoose && shape_of(config).block_n == 256 &&
      masks_of(p) == kSeveralMasks) {
    return "a group with dropout needs a tile of 128 columns";
  }
  for (int i = 0; i < p.problems; ++i) {
    const GemmProblem& problem = p.problem[i];
    if (problem.n == 0) continue;
    if (!aligned16(problem.c, problem.ldc)) {
      return "C is not 16-byte aligned or its rows are not (out_features, or in_features in "
             "backward, that is no multiple of 8)";
    }
    bool base = false;
    for (int t = problem.first_term; t < problem.first_term + problem.terms; ++t) {
      const GemmTerm& term = p.term[t];
      if (term.k == 0) return "a term has an empty sum";
      if (!aligned16(term.a, term.lda) || !aligned16(term.b, term.ldb)) {
        return "an operand is not 16-byte aligned or its rows are not (features that are no "
               "multiple of 8, a sliced tensor)";
      }
      base = base || term.stream < 0;
    }
    if (!base) return "a problem has no term without a mask";
  }
  return nullptr;
}

Sm90Config choose_sm90(const GemmParams& p) {
  const bool pairs = p.m > kSm90BlockM;
  if (masks_of(p) == kSeveralMasks)
    return pairs ? Sm90Config::k128x128Cluster : Sm90Config::k128x128;
  // Rounds of the grid in units of a 128 x 128 tile; the wide tile needs fewer bytes per product,
  // which the model prices at an eighth. Not measured.
  const int64_t wide = 16 * ceil_div(count_tiles(p, 256), p.sm_count);
  const int64_t narrow = 9 * ceil_div(count_tiles(p, 128), p.sm_count);
  if (narrow < wide) return pairs ? Sm90Config::k128x128Cluster : Sm90Config::k128x128;
  return pairs ? Sm90Config::k128x256Cluster : Sm90Config::k128x256;
}

cudaError_t launch_gemm_sm90(const GemmParams& p, Sm90Config config, cudaStream_t stream) {
  if (check_sm90(p, config) != nullptr) return cudaErrorInvalidValue;
  if (config == Sm90Config::kChoose) config = choose_sm90(p);
  const Shape shape = shape_of(config);
  const Sm90Masks masks = masks_of(p);
  const void* kernel = p.dtype == Dtype::kBFloat16 ? gemm_sm90_bf16(p.layout, shape.block_n, masks)
                                                   : gemm_sm90_fp16(p.layout, shape.block_n, masks);
  Sm90Params q;
  return launch_kernel_sm90(p, config, kernel, q, stream);
}

cudaError_t launch_kernel_sm90(const GemmParams& p, Sm90Config config, const void* kernel,
                               Sm90Params& q, cudaStream_t stream) {
  if (kernel == nullptr || config == Sm90Config::kChoose) return cudaErrorInvalidValue;
  const Shape shape = shape_of(config);
  const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;

  const bool transposed = p.layout == OperandLayout::kKN;
  std::memset(&q, 0, sizeof q);
  q.m = static_cast<int>(p.m);
  q.m_blocks = static_cast<int>(ceil_div(p.m, kSm90BlockM * shape.cluster));
  q.band = kSm90Band / shape.cluster;
  q.dropout = p.dropout;
  int64_t tiles = 0;
  for (int i = 0; i < p.problems; ++i) {
    const GemmProblem& from = p.problem[i];
    if (p.m == 0 || from.n == 0) continue;
    Sm90Problem& to = q.problem[q.problems];
    to.bias = from.bias;
    to.bias_dtype = from.bias_dtype;
    to.n = static_cast<int>(from.n);
    to.n_blocks = static_cast<int>(ceil_div(from.n, shape.block_n));
    to.first_tile = static_cast<int>(tiles);
    to.first_term = from.first_term;
    to.terms = from.terms;
    tiles += int64_t{q.m_blocks} * to.n_blocks;
    if (!encode_matrix(encode, &q.c[q.problems], p.dtype, from.c, p.m, from.n, from.ldc, 64)) {
      return cudaErrorInvalidValue;
    }
    for (int t = from.first_term; t < from.first_term + from.terms; ++t) {
      const GemmTerm& term = p.term[t];
      q.k[t] = static_cast<int>(term.k);
      q.stream[t] = term.stream;
      const int64_t rows = transposed ? term.k : from.n;
      const int64_t columns = transposed ? from.n : term.k;
      if (!encode_matrix(encode, &q.a[t], p.dtype, term.a, p.m, term.k, term.lda, kSm90BlockM) ||
          !encode_matrix(encode, &q.b[t], p.dtype, term.b, rows, columns, term.ldb,
                         transposed ? kSm90BlockK : 128)) {
        return cudaErrorInvalidValue;
      }
    }
    ++q.problems;
  }
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  q.tiles = static_cast<int>(tiles);

  const int shared =
      shape.block_n == 256 ? Sm90Tile<256>::kSharedBytes : Sm90Tile<128>::kSharedBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  const int64_t most = p.sm_count / shape.cluster > 0 ? p.sm_count / shape.cluster : 1;
  const unsigned clusters = static_cast<unsigned>(tiles < most ? tiles : most);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(clusters * static_cast<unsigned>(shape.cluster));
  launch.blockDim = dim3(kSm90Threads);
  launch.dynamicSmemBytes = static_cast<size_t>(shared);
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  void* arguments[] = {&q};
  return cudaLaunchKernelExC(&launch, kernel, arguments);
}

}  // namespace lora_kernels::lora_linear::cuda
