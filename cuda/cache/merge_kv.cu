// Entries that leave a cache are merged into those that stay, as common/kv_merge_problem.h says. One kernel after the
// other: norms of all keys (they wait in `similarity`), the places of kept entries, the nearest kept key of every
// evicted one, the merged rows into a workspace, and from there to the front of the cache.
#include "cache/cache.h"
#include "primitives/element.h"
#include "primitives/reduce.h"

namespace effops::device {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;

struct Params {
  KvMergeProblem p;
  char* rows;  // [batch, heads, kept entries, k_dim + v_dim], merged
};

struct Head {
  int64_t b, g, i;  // i: an entry, or a place among the kept ones

  __device__ Head(const KvMergeProblem& p, int64_t index, int64_t each)
      : b(index / each / p.heads), g(index / each % p.heads), i(index % each) {}
};

template <class T>
__device__ const T* row_of(const TensorView4& x, int64_t b, int64_t g, int64_t slot) {
  return reinterpret_cast<const T*>(x.data) + b * x.batch + slot * x.token + g * x.head;
}

template <class T>
__global__ void key_norms(const __grid_constant__ Params a) {
  using C = Compute<T>;
  const KvMergeProblem& p = a.p;
  const int64_t index = int64_t(blockIdx.x) * kWarps + warp_index();
  if (index >= p.batch * p.heads * p.slots) return;
  const Head h(p, index, p.slots);
  C norm = 0;
  if (p.mode != KvMerge::none && p.kept.count > 0 && h.i < p.len(h.b)) {
    const T* const key = row_of<T>(p.k, h.b, h.g, h.i);
    C largest = 0, squares = 0;
    for (int64_t d = lane_index(); d < p.k_dim; d += kWarp) {
      const C x = widen(key[d * p.k.dim]), size = x < 0 ? -x : x;
      largest = max_of(largest, size);
    }
    largest = reduce_lanes<kWarp>(largest, Max());
    for (int64_t d = lane_index(); d < p.k_dim; d += kWarp) {
      const C x = widen(key[d * p.k.dim]) / largest;
      squares += x * x;
    }
    norm = usable_norm(largest * square_root(reduce_lanes<kWarp>(squares, Sum())));
  }
  if (lane_index() != 0) return;
  reinterpret_cast<C*>(p.similarity)[index] = norm;
  p.nearest[index] = -1;
}

__global__ void kept_places(const __grid_constant__ Params a) {
  const KvMergeProblem& p = a.p;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.batch * p.heads * p.kept.count) return;
  const Head h(p, index, p.kept.count);
  const int64_t slot = p.entry(h.b, h.g, h.i);
  if (slot < 0 || slot >= p.len(h.b)) return;
  atomicMax(&p.nearest[p.at(h.b, h.g, slot)], static_cast<int32_t>(h.i));  // unchecked, an entry may be named twice
}

// A warp has an evicted entry, a lane every 32nd of the kept ones.
template <class T>
__global__ void nearest_kept(const __grid_constant__ Params a) {
  using C = Compute<T>;
  const KvMergeProblem& p = a.p;
  const int64_t index = int64_t(blockIdx.x) * kWarps + warp_index();
  if (index >= p.batch * p.heads * p.slots) return;
  const Head h(p, index, p.slots);
  C* const similarity = reinterpret_cast<C*>(p.similarity) + p.at(h.b, h.g, 0);
  const int64_t len = p.len(h.b);
  if (h.i >= len || p.nearest[index] >= 0) return;
  C* const own = reinterpret_cast<C*>(shared_memory()) + warp_index() * p.k_dim;
  const C norm = similarity[h.i];
  const T* const key = row_of<T>(p.k, h.b, h.g, h.i);
  for (int64_t d = lane_index(); d < p.k_dim; d += kWarp) own[d] = norm > 0 ? widen(key[d * p.k.dim]) / norm : C(0);
  __syncwarp();
  constexpr C kNone = -std::numeric_limits<C>::infinity();
  C best = kNone;
  int place = INT32_MAX;
  for (int64_t i = lane_index(); i < p.kept.count; i += kWarp) {
    const int64_t slot = p.entry(h.b, h.g, i);
    if (slot < 0 || slot >= len) continue;
    const T* const other = row_of<T>(p.k, h.b, h.g, slot);
    const C size = similarity[slot];
    C product = 0;
    for (int64_t d = 0; d < p.k_dim; ++d) product += (size > 0 ? widen(other[d * p.k.dim]) / size : C(0)) * own[d];
    if (!(product > best)) continue;
    best = product;
    place = static_cast<int>(i);
  }
  const C most = reduce_lanes<kWarp>(best, Max());
  const int first = -reduce_lanes<kWarp>(best == most ? -place : -INT32_MAX, Max());
  if (lane_index() != 0) return;
  similarity[h.i] = first == INT32_MAX ? C(0) : most;
  p.nearest[index] = first != INT32_MAX && static_cast<double>(most) >= p.least ? first : -1;
}

// A block has a kept entry, a thread some of its columns.
template <class T>
__global__ void merged_rows(const __grid_constant__ Params a) {
  using C = Compute<T>;
  const KvMergeProblem& p = a.p;
  const Head h(p, blockIdx.x, p.kept.count);
  const int64_t slot = p.entry(h.b, h.g, h.i), len = p.len(h.b);
  if (slot < 0 || slot >= len) return;
  const int32_t* const nearest = p.nearest + p.at(h.b, h.g, 0);
  C* const similarity = reinterpret_cast<C*>(p.similarity) + p.at(h.b, h.g, 0);
  T* const to = reinterpret_cast<T*>(a.rows) + blockIdx.x * (p.k_dim + p.v_dim);
  for (int64_t first = 0; first < p.k_dim + p.v_dim; first += kThreads) {
    const int64_t c = first + threadIdx.x;
    const bool keys = c < p.k_dim, there = c < p.k_dim + p.v_dim;
    const TensorView4& x = keys ? p.k : p.v;
    const int64_t column = there ? (keys ? c : c - p.k_dim) * x.dim : 0;
    const T* const from = row_of<T>(x, h.b, h.g, 0) + column;
    const T plain = there ? from[slot * x.token] : T{};
    const C own = widen(plain);
    C sum = 0;
    int count = 0;
    for (int64_t j = 0; j < len; j += kWarp) {
      const int64_t mine = j + lane_index();
      unsigned votes = __ballot_sync(kAllLanes, mine < len && mine != slot && nearest[mine] == h.i);
      count += __popc(votes);
      for (; there && votes != 0; votes &= votes - 1) {
        const int64_t e = j + __ffs(votes) - 1;
        sum += merged_part(p.mode, static_cast<C>(widen(from[e * x.token])), own, similarity[e]);
      }
    }
    if (there) to[c] = count == 0 ? plain : narrow<T>(own + sum / static_cast<C>(count + 1));
  }
  if (threadIdx.x == 0 && nearest[slot] == h.i) similarity[slot] = 1;
}

template <class T>
__global__ void rows_to_front(const __grid_constant__ Params a) {
  const KvMergeProblem& p = a.p;
  const Head h(p, blockIdx.x, p.kept.count);
  const int64_t slot = p.entry(h.b, h.g, h.i);
  if (slot < 0 || slot >= p.len(h.b)) return;
  const T* const from = reinterpret_cast<const T*>(a.rows) + blockIdx.x * (p.k_dim + p.v_dim);
  for (int64_t c = threadIdx.x; c < p.k_dim + p.v_dim; c += kThreads) {
    const TensorView4& x = c < p.k_dim ? p.k : p.v;
    const int64_t column = (c < p.k_dim ? c : c - p.k_dim) * x.dim;
    reinterpret_cast<T*>(x.data)[h.b * x.batch + h.i * x.token + h.g * x.head + column] = from[c];
  }
}

template <class T>
int start(const Params& a, void* stream) {
  const KvMergeProblem& p = a.p;
  const auto grid = [](int64_t count, int64_t each) { return dim3(static_cast<unsigned>((count + each - 1) / each)); };
  const int64_t heads = p.batch * p.heads, kept = heads * p.kept.count;
  const dim3 entries = grid(heads * p.slots, kWarps);
  const int64_t shared = kWarps * p.k_dim * static_cast<int64_t>(sizeof(Compute<T>));
  int status = launch<Params>({"merge_kv: norms", entries, kThreads, 0, stream}, &key_norms<T>, a);
  if (status == 0 && kept > 0)
    status = launch<Params>({"merge_kv: places", grid(kept, kThreads), kThreads, 0, stream}, &kept_places, a);
  if (status == 0 && kept > 0 && p.mode != KvMerge::none)
    status = launch<Params>({"merge_kv: nearest", entries, kThreads, shared, stream}, &nearest_kept<T>, a);
  if (status == 0) status = launch<Params>({"merge_kv: rows", grid(kept, 1), kThreads, 0, stream}, &merged_rows<T>, a);
  if (status != 0) return status;
  return launch<Params>({"merge_kv", grid(kept, 1), kThreads, 0, stream}, &rows_to_front<T>, a);
}

}  // namespace

int64_t kv_merge_workspace(const KvMergeProblem& p) {
  return p.batch * p.heads * p.kept.count * (p.k_dim + p.v_dim) * static_cast<int64_t>(size_of(p.dtype));
}

int kv_merge(const KvMergeProblem& p, void* workspace, void* stream) {
  const Params a{p, static_cast<char*>(workspace)};
  return with_element(p.dtype, [&](auto element) { return start<decltype(element)>(a, stream); });
}

}  // namespace effops::device
