// The labels of new keys: a block has some tokens of one sequence and head, a thread one number or word at a time.
#include "cache/place.h"
#include "selection/selection.h"

namespace effops::device {
namespace {

constexpr int kThreads = 128;

struct Params {
  LabelAppendProblem p;
  int64_t tiles;
  int size;
};

template <class T>
__device__ float key_channel(const LabelAppendProblem& p, const T* key, int64_t g, int64_t c) {
  const int64_t channel = p.channels.at(g, c);
  return channel < 0 || channel >= p.dim ? 0 : static_cast<float>(widen(key[channel * p.keys.dim]));
}

template <class T, class Label>
__global__ void append_labels_of(const __grid_constant__ Params a) {
  const LabelAppendProblem& p = a.p;
  const int64_t first = int64_t(blockIdx.x) % a.tiles * a.size, bg = blockIdx.x / a.tiles;
  const int64_t g = bg % p.heads, b = bg / p.heads;
  const SlotTile tile(p.slots, b, first, p.tokens, a.size);
  const int items = static_cast<int>(p.format.items());
  for (int64_t i = threadIdx.x; i < int64_t(tile.count) * items; i += blockDim.x) {
    const int t = static_cast<int>(i / items), item = static_cast<int>(i % items);
    const int64_t slot = tile.slot(t);
    if (slot < 0 || slot >= p.capacity) continue;
    const T* const key =
        reinterpret_cast<const T*>(p.keys.data) + b * p.keys.batch + (first + t) * p.keys.token + g * p.keys.head;
    Label* const to = reinterpret_cast<Label*>(p.labels.data) + b * p.labels.batch + slot * p.labels.token +
                      g * p.labels.head + item * p.labels.dim;
    if constexpr (std::is_same_v<Label, uint32_t>) {
      const int a_word = 32 / p.format.bits, begin = item * a_word;
      const int end = static_cast<int>(min_of<int64_t>(begin + a_word, p.format.channels));
      uint32_t word = 0;
      for (int c = begin; c < end; ++c)
        word |= label_bits(key_channel(p, key, g, c), p.scales.data ? p.scales.at(g, c) : 1,
                           p.offsets.data ? p.offsets.at(g, c) : 0, p.format.bits)
                << ((c - begin) * p.format.bits);
      *to = word;
    } else {
      *to = narrow<Label>(label_number(key_channel(p, key, g, item), p.offsets.data ? p.offsets.at(g, item) : 0));
    }
  }
}

template <class T>
int start(const LabelAppendProblem& p, void* stream) {
  Params a{p, 0, SlotTile::size(p.tokens)};
  a.tiles = (p.tokens + a.size - 1) / a.size;
  const Launch l{"append_labels", dim3(static_cast<unsigned>(a.tiles * p.heads * p.batch)), kThreads,
                 SlotTile::kSharedBytes, stream};
  if (p.format.bits != 0) return launch<Params>(l, &append_labels_of<T, uint32_t>, a);
  if (p.format.dtype == DType::bf16) return launch<Params>(l, &append_labels_of<T, bf16>, a);
  if (p.format.dtype == DType::f16) return launch<Params>(l, &append_labels_of<T, f16>, a);
  return launch<Params>(l, &append_labels_of<T, float>, a);
}

}  // namespace

int label_append(const LabelAppendProblem& p, void* stream) {
  return with_element(p.dtype, [&](auto element) { return start<decltype(element)>(p, stream); });
}

}  // namespace effops::device
