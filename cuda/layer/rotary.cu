// Rotary embedding of [batch, tokens, heads, dim]: neighbouring lanes share a head.
#include "layer/layer.h"
#include "layer/turn.h"

namespace effops::device {
namespace {

constexpr int kThreads = 128;

struct Params {
  RotaryProblem p;
  int lanes;  // of a row: a power of two up to kThreads
};

template <class T, int kCount>
__global__ void rotary_rows(Params a) {
  const RotaryProblem& p = a.p;
  const int64_t rows_a_block = blockDim.x / a.lanes;
  const int64_t pieces = Turn<T, kCount>::pieces(p.angles.half, p.dim);
  for (int64_t row = blockIdx.x * rows_a_block + threadIdx.x / a.lanes; row < p.rows.rows();
       row += gridDim.x * rows_a_block) {
    const int64_t token = row / p.rows.size[2];
    const Turn<T, kCount> turn(p.angles, p.dim, token / p.rows.size[1], token % p.rows.size[1]);
    const T* const x = reinterpret_cast<const T*>(p.x) + p.rows.offset(row);
    T* const y = reinterpret_cast<T*>(p.y) + row * p.dim;
    for (int64_t i = threadIdx.x % a.lanes; i < pieces; i += a.lanes) turn.piece(i, x, y, 1);
  }
}

template <class T, int kCount>
int start(const RotaryProblem& p, void* stream) {
  Params a{p, 1};
  const int64_t pieces = (p.dim - p.angles.half) / kCount;
  while (a.lanes < pieces && a.lanes < kThreads) a.lanes *= 2;
  const int64_t blocks = (p.rows.rows() * a.lanes + kThreads - 1) / kThreads;
  return launch<Params>({"rotary", stride_grid(blocks), kThreads, 0, stream}, &rotary_rows<T, kCount>, a);
}

}  // namespace

int rotary(const RotaryProblem& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t item = sizeof(T);
    const bool pieces = turns_in_pieces<T>(p.angles, p.dim) && in_pieces(p.y, item, {}) &&
                        in_pieces(p.x, item, {p.rows.stride[0], p.rows.stride[1], p.rows.stride[2]});
    return pieces ? start<T, kItems16<T>>(p, stream) : start<T, 1>(p, stream);
  });
}

}  // namespace effops::device
