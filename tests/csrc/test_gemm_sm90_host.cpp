// The host side of the sm_90a GEMM without a GPU: the CUDA runtime is replaced by functions that
// keep what they are given, and the tiles that a launch describes are computed here, element by
// element, through the tensor maps that it encoded. Values are small integers, so every sum is
// exact and the results must be equal. What lies around the operands is NaN.
//
// Needs the toolkit's headers, no library of it.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "common/philox.h"
#include "lora_linear/cuda/gemm_sm90.h"
#include "lora_linear/cuda/gemm_sm90_kernels.h"
#include "lora_linear/cuda/gemm_sm90_params.h"
#include "lora_linear/cuda/gemm_sm90_schedule.h"
#include "lora_linear/cuda/launch.h"

using namespace lora_kernels;
using namespace lora_kernels::lora_linear::cuda;

namespace {

struct Map {
  CUtensorMapDataType type;
  const uint16_t* data;
  uint64_t columns, rows, stride;
  uint32_t box_columns, box_rows;
};

struct Kernel {
  OperandLayout layout;
  int block_n;
  Sm90Masks masks;
};

std::vector<Map> maps;
Sm90Params launched;
cudaLaunchConfig_t config;
unsigned cluster;
int shared_limit;
const Kernel* kernel;
int launches = 0;

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  // What the driver refuses.
  const bool right =
      rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && extents[0] > 0 &&
      extents[1] > 0 && strides[0] % 16 == 0 && strides[0] >= 2 * extents[0] &&
      strides[0] < (1ull << 40) && box[0] * 2 <= 128 && box[0] > 0 && box[1] > 0 && box[1] <= 256 &&
      steps[0] == 1 && steps[1] == 1 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
      swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  if (!right) return CUDA_ERROR_INVALID_VALUE;
  maps.push_back({type, static_cast<const uint16_t*>(data), extents[0], extents[1], strides[0] / 2,
                  box[0], box[1]});
  const uint64_t index = maps.size();
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &index, sizeof index);
  return CUDA_SUCCESS;
}

const void* make_kernel(OperandLayout layout, int block_n, Sm90Masks masks) {
  static std::vector<Kernel*> made;
  if (masks != kNoMask && layout == OperandLayout::kNK) return nullptr;
  if (masks == kSeveralMasks && block_n != 128) return nullptr;
  made.push_back(new Kernel{layout, block_n, masks});
  return made.back();
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  CHECK(std::strcmp(name, "cuTensorMapEncodeTiled") == 0, "%s", name);
  *entry = reinterpret_cast<void*>(&encode);
  *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  CHECK(attribute == cudaFuncAttributeMaxDynamicSharedMemorySize, "attribute");
  shared_limit = value;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* given, const void* function,
                                void** args) {
  config = *given;
  cluster = given->attrs[0].val.clusterDim.x;
  CHECK(given->numAttrs == 1 && given->attrs[0].id == cudaLaunchAttributeClusterDimension,
        "cluster");
  kernel = static_cast<const Kernel*>(function);
  std::memcpy(&launched, args[0], sizeof launched);
  ++launches;
  return cudaSuccess;
}

namespace lora_kernels::lora_linear::cuda {
const void* gemm_sm90_bf16(OperandLayout l, int n, Sm90Masks m) { return make_kernel(l, n, m); }
const void* gemm_sm90_fp16(OperandLayout l, int n, Sm90Masks m) { return make_kernel(l, n, m); }
size_t shrink_workspace(const ShrinkParams&) { return 0; }
size_t dy_pass_workspace(const DyPassParams&) { return 0; }
size_t da_workspace(const DaParams&) { return 0; }
}  // namespace lora_kernels::lora_linear::cuda

namespace {

std::mt19937 random_bits(5);

// A matrix of small integers inside a buffer of NaN.
struct Buffer {
  int64_t rows, columns, ld;
  std::vector<uint16_t> memory;
  size_t start;

  Buffer(int64_t r, int64_t c, int64_t l) : rows(r), columns(c), ld(l) {
    memory.assign(static_cast<size_t>((r + 1) * l + 16), 0x7fc0);
    start = (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 / 2;
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < c; ++j) {
        bf16 v;
        from_float(static_cast<float>(static_cast<int>(random_bits() % 5) - 2), v);
        at(i, j) = v.bits;
      }
    }
  }
  uint16_t& at(int64_t i, int64_t j) { return memory[start + static_cast<size_t>(i * ld + j)]; }
  float value(int64_t i, int64_t j) { return to_float(bf16{at(i, j)}); }
  void* data() { return memory.data() + start; }
};

const Map& map_of(const CUtensorMap& map) {
  uint64_t index;
  std::memcpy(&index, &map, sizeof index);
  CHECK(index >= 1 && index <= maps.size(), "a tensor map was not encoded");
  return maps[index - 1];
}

float element(const Map& m, int64_t row, int64_t column) {
  const bool inside = row >= 0 && column >= 0 && row < static_cast<int64_t>(m.rows) &&
                      column < static_cast<int64_t>(m.columns);
  return inside ? to_float(bf16{m.data[row * static_cast<int64_t>(m.stride) + column]}) : 0.0f;
}

bool kept(const Dropout& d, int64_t row, int64_t column, int stream) {
  uint32_t word[4];
  philox_words(d.key[0], d.key[1], static_cast<uint32_t>(16 * (column / 128) + column % 32 / 2),
               static_cast<uint32_t>(row), static_cast<uint32_t>(stream), word);
  const uint32_t w = word[column % 128 / 32];
  return (column % 2 ? w >> 16 : w & 0xffffu) >= d.threshold;
}

// What the blocks of the captured launch do, by the rules of gemm_sm90.cuh.
void run_launch() {
  const Sm90Params& p = launched;
  const int block_n = kernel->block_n;
  const bool transposed = kernel->layout == OperandLayout::kKN;
  for (int tile = 0; tile < p.tiles; ++tile) {
    int i = 0;
    while (i + 1 < p.problems && tile >= p.problem[i + 1].first_tile) ++i;
    const Sm90Problem& problem = p.problem[i];
    const TilePlace place =
        place_tile(tile - problem.first_tile, p.m_blocks, problem.n_blocks, p.band);
    const Map& c = map_of(p.c[i]);
    CHECK(c.box_columns == 64 && c.box_rows == 64, "box of C");
    CHECK(place.m_block * static_cast<int>(cluster) * kSm90BlockM < p.m, "tile %d has no row",
          tile);
    for (unsigned rank = 0; rank < cluster; ++rank) {
      const int64_t m0 = (place.m_block * static_cast<int64_t>(cluster) + rank) * kSm90BlockM;
      const int64_t n0 = static_cast<int64_t>(place.n_block) * block_n;
      for (int64_t row = m0; row < m0 + kSm90BlockM && row < p.m; ++row) {
        for (int64_t column = n0; column < n0 + block_n && column < problem.n; ++column) {
          float sum = 0.0f;
          for (int t = problem.first_term; t < problem.first_term + problem.terms; ++t) {
            const Map &a = map_of(p.a[t]), &b = map_of(p.b[t]);
            CHECK(a.box_rows == 128 && b.box_rows == (transposed ? 64u : 128u), "boxes");
            const TermBlocks blocks = term_blocks(p.k[t]);
            float part = 0.0f;
            for (int64_t k = 0; k < 64 * blocks.full + 16 * blocks.tail; ++k) {
              part +=
                  element(a, row, k) * (transposed ? element(b, k, column) : element(b, column, k));
            }
            if (kernel->masks != kNoMask && p.stream[t] >= 0 &&
                !kept(p.dropout, row, column, p.stream[t])) {
              part = 0.0f;
            }
            sum += part;
          }
          if (problem.bias != nullptr) sum += static_cast<const float*>(problem.bias)[column];
          bf16 out;
          from_float(sum, out);
          uint16_t* to =
              const_cast<uint16_t*>(c.data) + row * static_cast<int64_t>(c.stride) + column;
          CHECK(*to == 0xffff, "element %ld %ld is written twice", static_cast<long>(row),
                static_cast<long>(column));
          *to = out.bits;
        }
      }
    }
  }
}

struct Case {
  OperandLayout layout;
  int64_t m;
  std::vector<int64_t> n;  // of the problems
  std::vector<int64_t> k;  // of the terms of each problem, masked ones first
  int masked;
  uint32_t threshold;
  Sm90Config config;
};

int64_t round8(int64_t v) { return (v + 7) / 8 * 8; }

void check_case(const Case& x) {
  const bool transposed = x.layout == OperandLayout::kKN;
  GemmParams p{};
  p.dtype = Dtype::kBFloat16;
  p.layout = x.layout;
  p.m = x.m;
  p.problems = static_cast<int>(x.n.size());
  p.sm_count = 3;
  p.dropout.threshold = x.threshold;
  p.dropout.key[0] = 17, p.dropout.key[1] = 4;
  std::vector<Buffer> as, bs, cs;
  std::vector<std::vector<float>> biases;
  as.reserve(64), bs.reserve(64), cs.reserve(64), biases.reserve(64);
  int t = 0;
  for (size_t i = 0; i < x.n.size(); ++i) {
    GemmProblem& problem = p.problem[i];
    problem.n = x.n[i];
    cs.emplace_back(x.m, x.n[i], round8(x.n[i]) + 8);
    for (int64_t r = 0; r < x.m; ++r) {
      for (int64_t c = 0; c < x.n[i]; ++c) cs.back().at(r, c) = 0xffff;
    }
    problem.c = cs.back().data();
    problem.ldc = cs.back().ld;
    biases.emplace_back(static_cast<size_t>(x.n[i]));
    for (float& b : biases.back()) b = static_cast<float>(static_cast<int>(random_bits() % 7) - 3);
    problem.bias = i % 2 == 0 ? biases.back().data() : nullptr;
    problem.bias_dtype = Dtype::kFloat32;
    problem.first_term = t;
    problem.terms = static_cast<int>(x.k.size());
    for (size_t j = 0; j < x.k.size(); ++j, ++t) {
      as.emplace_back(x.m, x.k[j], round8(x.k[j]) + 16);
      const int64_t rows = transposed ? x.k[j] : x.n[i], columns = transposed ? x.n[i] : x.k[j];
      bs.emplace_back(rows, columns, round8(columns) + 8);
      p.term[t] = {as.back().data(), as.back().ld,
                   bs.back().data(), bs.back().ld,
                   x.k[j],           static_cast<int>(j) < x.masked ? static_cast<int>(j) : -1};
    }
  }
  maps.clear();
  const char* why = check_sm90(p);
  CHECK(why == nullptr, "refused: %s", why);
  const cudaError_t error = launch_gemm_sm90(p, x.config, nullptr);
  CHECK(error == cudaSuccess, "error %d", error);
  if (why != nullptr || error != cudaSuccess) return;
  CHECK(
      (kernel->masks != kNoMask) == (x.masked > 0 && x.threshold > 0) && kernel->layout == x.layout,
      "kernel");
  CHECK(config.blockDim.x == 384 && config.gridDim.x % cluster == 0 &&
            config.gridDim.x >= cluster &&
            config.gridDim.x / cluster <= static_cast<unsigned>(launched.tiles),
        "grid %u of clusters of %u for %d tiles", config.gridDim.x, cluster, launched.tiles);
  CHECK(shared_limit == static_cast<int>(config.dynamicSmemBytes) && shared_limit <= 232448,
        "shared");
  run_launch();
  for (size_t i = 0; i < x.n.size(); ++i) {
    for (int64_t r = 0; r < x.m; ++r) {
      for (int64_t c = 0; c < x.n[i]; ++c) {
        float sum = p.problem[i].bias == nullptr ? 0.0f : biases[i][static_cast<size_t>(c)];
        for (size_t j = 0; j < x.k.size(); ++j) {
          Buffer &a = as[i * x.k.size() + j], &b = bs[i * x.k.size() + j];
          if (static_cast<int>(j) < x.masked && x.threshold > 0 &&
              !kept(p.dropout, r, c, static_cast<int>(j))) {
            continue;
          }
          for (int64_t k = 0; k < x.k[j]; ++k) {
            sum += a.value(r, k) * (transposed ? b.value(k, c) : b.value(c, k));
          }
        }
        bf16 want;
        from_float(sum, want);
        CHECK(cs[i].at(r, c) == want.bits, "problem %zu row %ld column %ld", i,
              static_cast<long>(r), static_cast<long>(c));
      }
    }
  }
}

void check_refusals() {
  Buffer a(40, 64, 64), b(40, 64, 64), c(40, 40, 40);
  GemmParams p{};
  p.dtype = Dtype::kBFloat16;
  p.layout = OperandLayout::kNK;
  p.m = 40, p.problems = 1, p.sm_count = 132;
  p.problem[0] = {40, c.data(), 40, nullptr, Dtype::kFloat32, 0, 1};
  p.term[0] = {a.data(), 64, b.data(), 64, 64, -1};
  CHECK(check_sm90(p) == nullptr, "%s", check_sm90(p));
  const auto refused = [&](const char* what, auto change) {
    GemmParams q = p;
    change(q);
    const int before = launches;
    CHECK(check_sm90(q) != nullptr, "%s is accepted", what);
    CHECK(launch_gemm_sm90(q, Sm90Config::kChoose, nullptr) == cudaErrorInvalidValue &&
              launches == before,
          "%s is launched", what);
  };
  refused("an odd row stride of A", [](GemmParams& q) { q.term[0].lda = 65; });
  refused("an odd address of B",
          [&](GemmParams& q) { q.term[0].b = static_cast<const uint16_t*>(q.term[0].b) + 1; });
  refused("an odd row stride of C", [](GemmParams& q) { q.problem[0].ldc = 41; });
  refused("an empty sum", [](GemmParams& q) { q.term[0].k = 0; });
  refused("a mask where B is [N, k]", [](GemmParams& q) {
    q.term[0].stream = 0;
    q.dropout.threshold = 9;
  });
  refused("masked terms alone", [](GemmParams& q) {
    q.layout = OperandLayout::kKN;
    q.term[0].ldb = 64;
    q.term[0].stream = 0;
    q.dropout.threshold = 9;
  });
  GemmParams several = p;
  several.layout = OperandLayout::kKN;
  several.problem[0].terms = 3;
  several.dropout.threshold = 9;
  for (int t = 0; t < 3; ++t) several.term[t] = {a.data(), 64, b.data(), 64, 40, t < 2 ? t : -1};
  CHECK(check_sm90(several) == nullptr, "%s", check_sm90(several));
  CHECK(check_sm90(several, Sm90Config::k128x256) != nullptr, "two masks in 256 columns");
  CHECK(launch_gemm_sm90(several, Sm90Config::k128x256, nullptr) == cudaErrorInvalidValue,
        "two masks in 256 columns are launched");
  refused("float32", [](GemmParams& q) { q.dtype = Dtype::kFloat32; });
  refused("no multiprocessors", [](GemmParams& q) { q.sm_count = 0; });
  p.m = 0;
  const int before = launches;
  CHECK(launch_gemm_sm90(p, Sm90Config::kChoose, nullptr) == cudaSuccess && launches == before,
        "no rows are a launch");
}

}  // namespace

int main() {
  const Sm90Config configs[] = {Sm90Config::kChoose, Sm90Config::k128x256Cluster,
                                Sm90Config::k128x256, Sm90Config::k128x128Cluster,
                                Sm90Config::k128x128};
  for (Sm90Config config : configs) {
    for (int64_t m : {1, 128, 130, 300}) {
      check_case({OperandLayout::kNK, m, {136, 264}, {5, 72}, 0, 0, config});
      check_case({OperandLayout::kNK, m, {8}, {16, 130}, 0, 0, config});
      check_case({OperandLayout::kKN, m, {264}, {16, 3, 72, 40}, 0, 0, config});
    }
    check_case({OperandLayout::kKN, 130, {264}, {16, 3, 72, 40}, 2, 0, config});
  }
  for (Sm90Config config :
       {Sm90Config::kChoose, Sm90Config::k128x128Cluster, Sm90Config::k128x128}) {
    check_case({OperandLayout::kKN, 130, {264}, {16, 3, 72, 40}, 2, 16384, config});
  }
  check_case(
      {OperandLayout::kNK, 260, std::vector<int64_t>(8, 40), {8, 24}, 0, 0, Sm90Config::kChoose});
  check_refusals();
  return finish("gemm_sm90_host");
}
