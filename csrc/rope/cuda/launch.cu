// Launcher of rotate.cuh, and what it accepts.
#include "launch.h"

#include "../../common/refusals.h"
#include "rotate.cuh"

namespace lora_kernels::rope::cuda {
namespace {

constexpr int64_t kMaxThreads = int64_t{1} << 30;  // of a launch
constexpr int kMaxHeadDim = 1 << 16;

bool aligned(const void* data, size_t size, int64_t batch, int64_t row, int64_t head) {
  const int64_t elements = static_cast<int64_t>(16 / size);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch % elements == 0 &&
         row % elements == 0 && head % elements == 0;
}

size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

bool aligned(const Table& t) {
  return t.channel == 1 && aligned(t.data, size_of(t.dtype), t.batch, t.row, 0);
}

// Every row of heads lies at a multiple of 16 bytes, and so does every item of it.
bool aligned(const RotateParams& p) {
  const size_t size = size_of(p.dtype);
  const int elements = static_cast<int>(16 / size);
  const int of_pairs = p.rotation.interleaved ? elements : 2 * elements;
  if (p.rotation.channels % of_pairs != 0 || p.head_dim % elements != 0) return false;
  for (int i = 0; i < p.tensors; ++i) {
    const RotateTensor& t = p.tensor[i];
    if (t.x_channel != 1 || t.y_channel != 1 ||
        !aligned(t.x, size, t.x_batch, t.x_row, t.x_head) ||
        !aligned(t.y, size, t.y_batch, t.y_row, t.y_head)) {
      return false;
    }
  }
  return true;
}

template <class T>
cudaError_t launch(const RotateArgs& args, Pairing pairing, cudaStream_t stream) {
  const dim3 grid((args.threads + kThreads - 1) / kThreads);
  const auto kernel = pairing == Pairing::kHalf          ? rotate_kernel<T, Pairing::kHalf>
                      : pairing == Pairing::kInterleaved ? rotate_kernel<T, Pairing::kInterleaved>
                                                         : rotate_kernel<T, Pairing::kScalar>;
  return launch_kernel(kernel, grid, kThreads, 0, stream, args);
}

}  // namespace

const char* check(const Rotation& r, int head_dim) {
  if (r.channels < 2 || r.channels % 2 != 0 || r.channels > head_dim) {
    return "the rotated channels are not even, at least 2 and at most those of a head";
  }
  if (r.sequence < 1 || r.sequence > kMaxExtent) return "the sequence is empty or too long";
  if (r.cos.data == nullptr || r.sin.data == nullptr) return "cos or sin is null";
  if (r.ids != nullptr && r.ids_bytes != 4 && r.ids_bytes != 8) return "ids are not int32 or int64";
  if (r.ids != nullptr && r.positions < 1) return "the cache has no positions";
  return nullptr;
}

const char* check(const RotateParams& p) {
  if (p.dtype != Dtype::kFloat32 && p.dtype != Dtype::kBFloat16 && p.dtype != Dtype::kFloat16) {
    return "dtype is not supported; float32, bfloat16 and float16 are";
  }
  if (p.head_dim < 1 || p.head_dim > kMaxHeadDim) {
    return "a head has no or more than 65536 channels";
  }
  if (p.batch < 0 || p.batch > kMaxExtent) return "the batch is negative or too large";
  if (p.tensors < 1 || p.tensors > kMaxTensors) return "there are no or more than 8 tensors";
  if (const char* why = check(p.rotation, p.head_dim)) return why;
  if (p.batch * p.rotation.sequence > kMaxExtent) return "there are 2^31 - 1024 or more positions";
  for (int i = 0; i < p.tensors; ++i) {
    const RotateTensor& t = p.tensor[i];
    if (t.heads < 0 || t.heads > (1 << 20)) return "there are negative or more than 2^20 heads";
    if (t.heads > 0 && p.batch > 0 && (t.x == nullptr || t.y == nullptr)) {
      return "a tensor that is read or written is null";
    }
  }
  return nullptr;
}

cudaError_t launch_rotate(const RotateParams& p, cudaStream_t stream) {
  if (check(p) != nullptr) return cudaErrorInvalidValue;
  const bool wide = aligned(p), interleaved = p.rotation.interleaved;
  const Pairing pairing = !wide         ? Pairing::kScalar
                          : interleaved ? Pairing::kInterleaved
                                        : Pairing::kHalf;
  RotateArgs args{p, {}, 0, 0, 0, 0, wide && aligned(p.rotation.cos) && aligned(p.rotation.sin)};
  for (int i = 0; i < p.tensors; ++i) {
    args.first_group[i] = args.groups;
    args.groups += (p.tensor[i].heads + kHeads - 1) / kHeads;
  }
  const int per_load = wide ? static_cast<int>(16 / size_of(p.dtype)) : 1;
  const int R = p.rotation.channels;
  const int of_pairs = pairing == Pairing::kInterleaved ? per_load : 2 * per_load;
  args.items = R / of_pairs + (p.head_dim - R) / per_load;
  const int64_t places = p.batch * p.rotation.sequence;
  const int64_t per_place = static_cast<int64_t>(args.groups) * args.items;
  if (places == 0 || per_place == 0) return cudaSuccess;
  if (per_place > kMaxThreads) return cudaErrorInvalidValue;
  const int64_t most = kMaxThreads / per_place;
  for (int64_t first = 0; first < places; first += most) {
    const int64_t some = places - first < most ? places - first : most;
    args.first_place = static_cast<uint32_t>(first);
    args.threads = static_cast<uint32_t>(some * per_place);
    const cudaError_t error = p.dtype == Dtype::kFloat32    ? launch<float>(args, pairing, stream)
                              : p.dtype == Dtype::kBFloat16 ? launch<bf16>(args, pairing, stream)
                                                            : launch<fp16>(args, pairing, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lora_kernels::rope::cuda
