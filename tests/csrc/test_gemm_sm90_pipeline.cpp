// The pipeline of the sm_90a GEMM as a simulation: producers, consumer warps and the copy engine of
// a cluster take steps in random order against a model of mbarrier (PTX ISA: pending arrivals,
// pending bytes, phase). A stage must hold exactly the block of A and B that a consumer expects
// from the moment it may read it until it has given it back, and all must come to an end. Planted
// faults must be noticed. The order of events inside an agent is that of gemm_sm90.cuh.
#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "lora_linear/cuda/gemm_sm90_schedule.h"

using namespace lora_kernels::lora_linear::cuda;

namespace {

enum class Fault { kNone, kLocalReleaseOnly, kProducerPhase, kFewerBytes, kEarlyRelease };

struct Barrier {
  int count = 0, pending = 0, bytes = 0;
  uint32_t phase = 0;

  void init(int n) { count = pending = n; }
  void settle() {
    if (pending == 0 && bytes == 0) {
      pending = count;
      phase ^= 1;
    }
  }
  void arrive() { --pending, settle(); }
  void arrive_expect(int n) {
    bytes += n;
    arrive();
  }
  void complete(int n) { bytes -= n, settle(); }
  bool ended(uint32_t parity) const { return phase != parity; }
};

struct Item {  // one k block of one term of one tile
  int tile, term, block, steps;
  bool last_of_tile, last_of_term;
};

struct Copy {  // bytes under way to one stage of one block
  int block, stage, box, item;
};

constexpr int kABox = -1;

struct Config {
  int stages, blocks, boxes, tiles;
  std::vector<int> terms;  // k of each
  int masked;              // the first terms that are masked
  Fault fault;
};

class Cluster {
 public:
  Cluster(const Config& config, uint32_t seed) : c_(config), random_(seed) {
    for (int tile = 0; tile < c_.tiles; ++tile) {
      for (size_t t = 0; t < c_.terms.size(); ++t) {
        const TermBlocks b = term_blocks(c_.terms[t]);
        const int all = b.full + (b.tail > 0);
        for (int k = 0; k < all; ++k) {
          const bool end = k + 1 == all;
          items_.push_back({tile, static_cast<int>(t), k, k < b.full ? 4 : b.tail,
                            end && t + 1 == c_.terms.size(), end});
        }
      }
    }
    for (int b = 0; b < c_.blocks; ++b) {
      Block block;
      block.full.resize(static_cast<size_t>(c_.stages));
      block.empty.resize(static_cast<size_t>(c_.stages));
      block.holds.assign(static_cast<size_t>(c_.stages * (c_.boxes + 1)), -1);
      block.warps.resize(kSm90ConsumerWarps);
      for (Barrier& barrier : block.full) barrier.init(1);
      for (Barrier& barrier : block.empty) barrier.init(c_.blocks * kSm90ConsumerWarps);
      blocks_.push_back(block);
    }
  }

  // "" or what went wrong.
  std::string run() {
    const size_t agents = blocks_.size() * (1 + kSm90ConsumerWarps) + 1;
    std::vector<size_t> order(agents);
    for (size_t i = 0; i < agents; ++i) order[i] = i;
    for (;;) {
      std::shuffle(order.begin(), order.end(), random_);
      bool moved = false;
      for (size_t agent : order) {
        moved = step(agent) || moved;
        if (!wrong_.empty()) return wrong_;
        if (random_() % 3 == 0) break;  // some agents get several turns before others get one
      }
      if (done()) return "";
      if (!moved) {
        for (size_t agent : order) moved = step(agent) || moved;
        if (!wrong_.empty()) return wrong_;
        if (!moved && !done()) return "deadlock";
      }
    }
  }

 private:
  struct Warp {
    PipelinePlace place;
    size_t item = 0;
    int held = -1, held_item = -1;
  };
  struct Block {
    std::vector<Barrier> full, empty;
    std::vector<int> holds;  // [stage][A, boxes of B]: the item whose data lies there
    PipelinePlace producer;
    size_t produced = 0;
    std::vector<Warp> warps;
  };

  bool done() const {
    if (!copies_.empty()) return false;
    for (const Block& b : blocks_) {
      if (b.produced < items_.size()) return false;
      for (const Warp& w : b.warps) {
        if (w.item < items_.size() || w.held >= 0) return false;
      }
    }
    return true;
  }

  void advance(PipelinePlace& place) const {
    c_.stages == Sm90Tile<256>::kStages ? place.advance<Sm90Tile<256>::kStages>()
                                        : place.advance<Sm90Tile<128>::kStages>();
  }

  int& slot(int block, int stage, int box) {
    return blocks_[static_cast<size_t>(block)]
        .holds[static_cast<size_t>(stage * (c_.boxes + 1) + box + 1)];
  }

  bool step(size_t agent) {
    if (agent == 0) return deliver();
    const size_t block = (agent - 1) % blocks_.size(), role = (agent - 1) / blocks_.size();
    return role == 0 ? produce(static_cast<int>(block))
                     : consume(static_cast<int>(block), blocks_[block].warps[role - 1]);
  }

  // The copy engine finishes any one of the copies under way.
  bool deliver() {
    if (copies_.empty()) return false;
    const size_t i = random_() % copies_.size();
    const Copy copy = copies_[i];
    copies_[i] = copies_.back();
    copies_.pop_back();
    for (const Warp& w : blocks_[static_cast<size_t>(copy.block)].warps) {
      if (w.held == copy.stage) wrong_ = "a stage was overwritten while it was read";
    }
    slot(copy.block, copy.stage, copy.box) = copy.item;
    blocks_[static_cast<size_t>(copy.block)].full[static_cast<size_t>(copy.stage)].complete(1);
    return true;
  }

  bool produce(int index) {
    Block& b = blocks_[static_cast<size_t>(index)];
    if (b.produced == items_.size()) return false;
    const PipelinePlace place = b.producer;
    const uint32_t parity = c_.fault == Fault::kProducerPhase ? place.phase : place.phase ^ 1;
    if (!b.empty[static_cast<size_t>(place.stage)].ended(parity)) return false;
    const int expected = 1 + c_.boxes - (c_.fault == Fault::kFewerBytes ? 1 : 0);
    b.full[static_cast<size_t>(place.stage)].arrive_expect(expected);
    const int item = static_cast<int>(b.produced);
    copies_.push_back({index, place.stage, kABox, item});
    for (int box = index; box < c_.boxes; box += c_.blocks) {
      for (int to = 0; to < c_.blocks; ++to) copies_.push_back({to, place.stage, box, item});
    }
    ++b.produced;
    advance(b.producer);
    return true;
  }

  void release(int index, int stage) {
    for (int to = 0; to < c_.blocks; ++to) {
      if (c_.fault == Fault::kLocalReleaseOnly && to != index) continue;
      blocks_[static_cast<size_t>(to)].empty[static_cast<size_t>(stage)].arrive();
    }
  }

  void check_stage(int index, int stage, int item) {
    for (int box = kABox; box < c_.boxes; ++box) {
      if (slot(index, stage, box) != item) wrong_ = "a consumer found another block in its stage";
    }
  }

  // Gives the held stage back after a last look at it: the products have run until now.
  void finish(int index, Warp& w) {
    if (w.held < 0) return;
    check_stage(index, w.held, w.held_item);
    const int stage = w.held;
    w.held = -1;
    if (c_.fault != Fault::kEarlyRelease) release(index, stage);
  }

  bool consume(int index, Warp& w) {
    if (w.item == items_.size()) {
      const bool open = w.held >= 0;
      finish(index, w);
      return open;
    }
    // At the end of a tile, and of each masked term, nothing stays in flight.
    if (w.held >= 0 && w.item > 0) {
      const Item& before = items_[w.item - 1];
      if (before.last_of_tile || (before.last_of_term && before.term < c_.masked)) {
        finish(index, w);
        return true;
      }
    }
    Block& b = blocks_[static_cast<size_t>(index)];
    if (!b.full[static_cast<size_t>(w.place.stage)].ended(w.place.phase)) return false;
    const int item = static_cast<int>(w.item);
    check_stage(index, w.place.stage, item);
    if (c_.fault == Fault::kEarlyRelease) release(index, w.place.stage);
    finish(index, w);  // one group stays in flight, the one before has ended
    w.held = w.place.stage;
    w.held_item = item;
    ++w.item;
    advance(w.place);
    return true;
  }

  Config c_;
  std::mt19937 random_;
  std::vector<Item> items_;
  std::vector<Block> blocks_;
  std::vector<Copy> copies_;
  std::string wrong_;
};

Config make(int block_n, int blocks, int boxes, std::vector<int> terms, int masked, Fault fault) {
  const int stages = block_n == 256 ? Sm90Tile<256>::kStages : Sm90Tile<128>::kStages;
  return {stages, blocks, boxes, 3, std::move(terms), masked, fault};
}

}  // namespace

int main() {
  const std::vector<std::vector<int>> terms = {{16, 512}, {8, 24, 64, 130}, {100, 1}, {1, 2000}};
  for (uint32_t seed = 0; seed < 20; ++seed) {
    for (const auto& list : terms) {
      for (int blocks : {1, 2}) {
        for (int block_n : {128, 256}) {
          for (int boxes : {block_n / 128, block_n / 64}) {
            for (int masked : {0, static_cast<int>(list.size()) / 2}) {
              const std::string wrong =
                  Cluster(make(block_n, blocks, boxes, list, masked, Fault::kNone), seed).run();
              CHECK(wrong.empty(), "seed %u blocks %d columns %d: %s", seed, blocks, block_n,
                    wrong.c_str());
            }
          }
        }
      }
    }
  }
  for (Fault fault : {Fault::kLocalReleaseOnly, Fault::kProducerPhase, Fault::kFewerBytes,
                      Fault::kEarlyRelease}) {
    int noticed = 0;
    for (uint32_t seed = 0; seed < 20; ++seed) {
      noticed += !Cluster(make(256, 2, 4, {16, 512}, 0, fault), seed).run().empty();
    }
    CHECK(noticed > 0, "planted fault %d went unnoticed", static_cast<int>(fault));
  }
  return finish("gemm_sm90_pipeline");
}
