// New tokens into caches of a fixed size: a block has all tokens of one sequence and head, one after the other.
#include <limits>

#include "cache/cache.h"
#include "cache/place.h"

namespace effops::device {
namespace {

constexpr int kThreads = 256;
constexpr int kNoSlot = INT32_MAX;

template <class M>
class EvictingHead {
 public:
  __device__ EvictingHead(const EvictProblem& p, int64_t b, int64_t g, char* shared)
      : p_(p),
        mass_(reinterpret_cast<M*>(p.mass.data) + b * p.mass.batch + g * p.mass.head),
        positions_(reinterpret_cast<int32_t*>(p.positions.data) + b * p.positions.batch + g * p.positions.head),
        masses_(reinterpret_cast<M*>(shared)),
        numbers_(reinterpret_cast<int*>(shared)) {}

  static constexpr int kSharedBytes = kWarp * static_cast<int>(sizeof(M));

  // The slot that a new token takes; kNoSlot: none. The threads of the block together.
  __device__ int take(int64_t new_position) {
    while (free_ < p_.slots) {
      const int j = free_ + static_cast<int>(threadIdx.x);
      const int slot = least(j < p_.slots && position(j) < 0 ? j : kNoSlot);
      free_ = slot != kNoSlot ? slot + 1 : free_ + static_cast<int>(blockDim.x);
      if (slot != kNoSlot) return slot;
    }
    return slot_to_go(new_position);
  }

  __device__ void hold(int slot, int64_t new_position) {
    mass_[slot * p_.mass.token] = 0;
    positions_[slot * p_.positions.token] = static_cast<int32_t>(new_position);
  }

 private:
  __device__ int position(int slot) const { return positions_[slot * p_.positions.token]; }
  __device__ int least(int x) { return -reduce_block(-x, Max(), -kNoSlot, numbers_); }

  __device__ int slot_to_go(int64_t new_position) {
    constexpr M kInfinity = std::numeric_limits<M>::infinity();
    const int low = p_.first_to_go(), high = p_.last_to_go(new_position);
    M mass = kInfinity;
    int oldest = kNoSlot, slot = kNoSlot;
    for (int j = threadIdx.x; j < p_.slots; j += blockDim.x) {
      const int at = position(j);
      if (at < low || at > high) continue;
      const M x = rank_of(mass_[j * p_.mass.token], kInfinity);
      if (slot != kNoSlot && !(x < mass || (x == mass && at < oldest))) continue;
      mass = x;
      oldest = at;
      slot = j;
    }
    const bool lightest = mass == -reduce_block(-mass, Max(), -kInfinity, masses_);
    const int oldest_of_all = least(lightest ? oldest : kNoSlot);
    const bool first = lightest && oldest == oldest_of_all;
    return least(first ? slot : kNoSlot);
  }

  const EvictProblem& p_;
  M* mass_;
  int32_t* positions_;
  M* masses_;
  int* numbers_;
  int free_ = 0;  // slots below it are taken
};

template <class T, class M>
__global__ void __launch_bounds__(kThreads) append_evicting_to(const __grid_constant__ EvictProblem p) {
  const int64_t g = blockIdx.x % p.heads, b = blockIdx.x / p.heads;
  EvictingHead<M> head(p, b, g, shared_memory());
  const auto copy = [&](const TensorView4& from, const TensorView4& to, int64_t dim, int64_t t, int slot) {
    const T* const x = reinterpret_cast<const T*>(from.data) + b * from.batch + t * from.token + g * from.head;
    T* const y = reinterpret_cast<T*>(to.data) + b * to.batch + slot * to.token + g * to.head;
    for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) y[d * to.dim] = x[d * from.dim];
  };
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t position = p.new_positions.of(b, t);
    if (position < 0) continue;
    const int slot = head.take(position);
    if (slot == kNoSlot) continue;
    copy(p.k, p.k_cache, p.k_dim, t, slot);
    copy(p.v, p.v_cache, p.v_dim, t, slot);
    if (threadIdx.x == 0) head.hold(slot, position);
    __syncthreads();  // the next token finds it
  }
}

}  // namespace

int append_evicting(const EvictProblem& p, void* stream) {
  const auto start = [&](auto kernel, int64_t shared) {
    return launch<EvictProblem>(
        {"append_evicting", dim3(static_cast<unsigned>(p.heads * p.batch)), kThreads, shared, stream}, kernel, p);
  };
  return with_storage(p.bytes, [&](auto element) {
    using T = decltype(element);
    return p.mass_dtype == DType::f64 ? start(&append_evicting_to<T, double>, EvictingHead<double>::kSharedBytes)
                                      : start(&append_evicting_to<T, float>, EvictingHead<float>::kSharedBytes);
  });
}

}  // namespace effops::device
