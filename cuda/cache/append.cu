// New rows into a cache: a block has some tokens of one sequence and head.
#include "cache/cache.h"
#include "cache/place.h"

namespace effops::device {
namespace {

constexpr int kThreads = 128;

struct Params {
  AppendProblem p;
  int64_t tiles;
  int size;
};

template <class T, int kCount>
__global__ void append_rows_of(Params a) {
  const AppendProblem& p = a.p;
  const int64_t first = int64_t(blockIdx.x) % a.tiles * a.size, bh = blockIdx.x / a.tiles;
  const int64_t h = bh % p.heads, b = bh / p.heads;
  const SlotTile tile(p.slots, b, first, p.tokens, a.size);
  const int pieces = static_cast<int>((p.dim + kCount - 1) / kCount);
  const T* const from = reinterpret_cast<const T*>(p.from.data) + b * p.from.batch + h * p.from.head;
  T* const to = reinterpret_cast<T*>(p.to.data);
  for (int64_t i = threadIdx.x; i < int64_t(tile.count) * pieces; i += blockDim.x) {
    const int t = static_cast<int>(i / pieces);
    const int64_t d = i % pieces * kCount, place = place_of(p.to, p.pages, p.limits, b, h, tile.slot(t));
    if (place < 0) continue;
    Items<T, kCount>::load(from + (first + t) * p.from.token + d * p.from.dim).store(to + place + d * p.to.dim);
  }
}

template <class T>
int start(const AppendProblem& p, void* stream) {
  if (p.dim == 0) return 0;
  Params a{p, 0, SlotTile::size(p.tokens)};
  a.tiles = (p.tokens + a.size - 1) / a.size;
  const bool pieces = cache_in_pieces<T>(p.from, p.dim) && cache_in_pieces<T>(p.to, p.dim);
  const Launch l{"append_kv", dim3(static_cast<unsigned>(a.tiles * p.heads * p.batch)), kThreads,
                 SlotTile::kSharedBytes, stream};
  return pieces ? launch<Params>(l, &append_rows_of<T, kItems16<T>>, a) : launch<Params>(l, &append_rows_of<T, 1>, a);
}

}  // namespace

int append_rows(const AppendProblem& p, void* stream) {
  return with_storage(p.bytes, [&](auto element) { return start<decltype(element)>(p, stream); });
}

}  // namespace effops::device
