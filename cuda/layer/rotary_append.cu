// Queries turned, keys turned into the cache, values into the cache: a block has some tokens of one sequence and head.
#include "cache/place.h"
#include "layer/layer.h"
#include "layer/turn.h"

namespace effops::device {
namespace {

constexpr int kThreads = 128;

struct Params {
  RotaryAppendProblem p;
  int64_t tiles;
  int size;
};

template <class T, int kCount>
__global__ void rotary_append_rows(Params a) {
  const RotaryAppendProblem& p = a.p;
  const int64_t heads = p.heads + 2 * p.kv_heads, bh = blockIdx.x / a.tiles;
  const int64_t first = int64_t(blockIdx.x) % a.tiles * a.size, h = bh % heads, b = bh / heads;
  const int64_t kv = h - p.heads;  // from 0 on: a key or value head
  const TensorView4& cache = kv >= p.kv_heads ? p.v : p.k;
  Angles angles = p.angles;
  if (kv >= p.kv_heads) angles.rows = 0;  // values do not turn
  const SlotTile tile(p.slots, b, first, p.tokens, a.size);
  const int64_t pieces = Turn<T, kCount>::pieces(angles.half, p.dim);
  for (int64_t i = threadIdx.x; i < tile.count * pieces; i += blockDim.x) {
    const int t = static_cast<int>(i / pieces);
    const T* const x = reinterpret_cast<const T*>(p.x) + b * p.x_batch + (first + t) * p.x_token + h * p.x_head;
    T* y = reinterpret_cast<T*>(p.q) + ((b * p.tokens + first + t) * p.heads + h) * p.dim;
    if (kv >= 0) {
      const int64_t place = place_of(cache, p.pages, p.limits, b, kv % p.kv_heads, tile.slot(t));
      if (place < 0) continue;
      y = reinterpret_cast<T*>(cache.data) + place;
    }
    Turn<T, kCount>(angles, p.dim, b, first + t).piece(i % pieces, x, y, kv >= 0 ? cache.dim : 1);
  }
}

}  // namespace

int rotary_append(const RotaryAppendProblem& p, void* stream) {
  if (p.dim == 0) return 0;
  Params a{p, 0, SlotTile::size(p.tokens)};
  a.tiles = (p.tokens + a.size - 1) / a.size;
  const int64_t blocks = a.tiles * (p.heads + 2 * p.kv_heads) * p.batch;
  const Launch l{"rotary_append", dim3(static_cast<unsigned>(blocks)), kThreads, SlotTile::kSharedBytes, stream};
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool pieces = turns_in_pieces<T>(p.angles, p.dim) &&
                        in_pieces(p.x, sizeof(T), {p.x_batch, p.x_token, p.x_head}) && in_pieces(p.q, sizeof(T), {}) &&
                        cache_in_pieces<T>(p.k, p.dim) && cache_in_pieces<T>(p.v, p.dim);
    return pieces ? launch<Params>(l, &rotary_append_rows<T, kItems16<T>>, a)
                  : launch<Params>(l, &rotary_append_rows<T, 1>, a);
  });
}

}  // namespace effops::device
