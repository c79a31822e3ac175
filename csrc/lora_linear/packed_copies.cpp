#include "packed_copies.h"

#include <c10/util/hash.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "lora_linear_host.h"

namespace lora_kernels::lora_linear {
namespace {

constexpr int64_t kGrid = 8;

// storage, offset, n, k, both strides, dtype, dtype of the products, direction, engine
using Key = std::array<int64_t, 10>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    size_t seed = 0;
    for (int64_t part : key) seed = c10::hash_combine(seed, std::hash<int64_t>()(part));
    return seed;
  }
};

struct Copy {
  at::Tensor packed;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  uint32_t version;
  std::vector<char> sample;
};

struct Copies {
  std::mutex mutex;
  std::unordered_map<Key, Copy, KeyHash> map;
};

Copies& copies() {
  static Copies* instance = new Copies;  // tensors outlive the interpreter's teardown
  return *instance;
}

Key key_of(const at::Tensor& w, at::ScalarType dtype, bool for_dgrad) {
  return {reinterpret_cast<int64_t>(w.storage().unsafeGetStorageImpl()), w.storage_offset(),
          w.size(0), w.size(1), w.stride(0), w.stride(1), static_cast<int64_t>(w.scalar_type()),
          static_cast<int64_t>(dtype), for_dgrad, engine_id(dtype)};
}

uint32_t version_of(const at::Tensor& w) {
  return w.is_inference() ? 0 : static_cast<uint32_t>(w._version());
}

// Elements on a grid, whatever the strides; odd steps, so that no pattern of columns is missed.
template <class Visit>
void for_sample(const at::Tensor& w, const Visit& visit) {
  const int64_t n = w.size(0), k = w.size(1), down = n / kGrid | 1, across = k / kGrid | 1;
  const int64_t bytes = w.element_size();
  const char* data = static_cast<const char*>(w.const_data_ptr());
  for (int64_t i = 0; i < n; i += down) {
    for (int64_t j = 0; j < k; j += across) {
      visit(data + (i * w.stride(0) + j * w.stride(1)) * bytes, bytes);
    }
  }
}

std::vector<char> sample_of(const at::Tensor& w) {
  std::vector<char> sample;
  for_sample(w, [&](const char* at, int64_t bytes) { sample.insert(sample.end(), at, at + bytes); });
  return sample;
}

bool has_sample(const at::Tensor& w, const std::vector<char>& sample) {
  const char* kept = sample.data();
  bool equal = true;
  for_sample(w, [&](const char* at, int64_t bytes) {
    equal &= std::memcmp(at, kept, bytes) == 0;
    kept += bytes;
  });
  return equal;
}

int64_t living_bytes(const Copies& all) {
  int64_t sum = 0;
  for (const auto& [key, copy] : all.map) sum += copy.storage.expired() ? 0 : copy.packed.nbytes();
  return sum;
}

}  // namespace

std::optional<at::Tensor> packed_copy(const at::Tensor& weight, at::ScalarType dtype,
                                      bool for_dgrad) {
  Copies& all = copies();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.map.find(key_of(weight, dtype, for_dgrad));
  if (found == all.map.end()) return std::nullopt;
  const Copy& copy = found->second;
  if (!copy.storage.expired() && copy.version == version_of(weight) &&
      has_sample(weight, copy.sample)) {
    return copy.packed;
  }
  all.map.erase(found);
  return std::nullopt;
}

bool keep_packed_copy(const at::Tensor& weight, at::ScalarType dtype, bool for_dgrad,
                      const at::Tensor& packed, int64_t budget) {
  Copies& all = copies();
  const std::lock_guard<std::mutex> lock(all.mutex);
  for (auto it = all.map.begin(); it != all.map.end();) {
    it = it->second.storage.expired() ? all.map.erase(it) : std::next(it);
  }
  const int64_t bytes = static_cast<int64_t>(packed.nbytes());
  if (budget >= 0 && living_bytes(all) + bytes > budget) return false;
  all.map.insert_or_assign(key_of(weight, dtype, for_dgrad),
                           Copy{packed, weight.storage().getWeakStorageImpl(), version_of(weight),
                                sample_of(weight)});
  return true;
}

int64_t packed_copies_bytes() {
  Copies& all = copies();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return living_bytes(all);
}

int64_t packed_copies_count() {
  Copies& all = copies();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return static_cast<int64_t>(all.map.size());
}

void drop_packed_copies() {
  Copies& all = copies();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.map.clear();
}

}  // namespace lora_kernels::lora_linear
