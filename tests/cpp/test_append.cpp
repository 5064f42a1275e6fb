// append_rows: the cache after it, byte by byte.
#include "check.h"
#include "common/append.h"
#include "tensor.h"

namespace effops::test {
namespace {

void check_append(DType dtype, Layout from_layout, Layout to_layout) {
  constexpr int64_t kBatch = 2, kTokens = 5, kHeads = 3, kDim = 7, kCapacity = 6;
  Random random(17);
  Tensor from(dtype, {kBatch, kTokens, kHeads, kDim}, from_layout),
      to(dtype, {kBatch, kCapacity, kHeads, kDim}, to_layout);
  from.fill(random);
  from.freeze();
  // [batch, tokens] with strides (1, batch); the last of two writers of slot 4 stays.
  const List<int32_t> slots(std::vector<int32_t>{4, -1, -1, 5, 0, -1, 4, 0, 3, 0});
  AppendProblem p;
  p.batch = kBatch;
  p.tokens = kTokens;
  p.heads = kHeads;
  p.dim = kDim;
  p.bytes = static_cast<int64_t>(size_of(dtype));
  p.from = from.data();
  p.to = to.data();
  for (int i = 0; i < 4; ++i) {
    p.from_stride[i] = from.stride(i) * p.bytes;
    p.to_stride[i] = to.stride(i) * p.bytes;
  }
  p.slots = {slots.get(), 1, kBatch};
  append_rows(p);
  for (int64_t b = 0; b < kBatch; ++b)
    for (int64_t slot = 0; slot < kCapacity; ++slot) {
      int64_t writer = -1;
      for (int64_t t = 0; t < kTokens; ++t)
        if (slots.get()[b + t * kBatch] == slot) writer = t;
      for (int64_t h = 0; h < kHeads; ++h)
        for (int64_t d = 0; d < kDim; ++d) {
          const double got = to.get(b, slot, h, d);
          if (writer < 0) {
            CHECK(std::isnan(got), "slot ", slot, " of sequence ", b, " was written");
          } else {
            CHECK(got == from.get(b, writer, h, d), "slot ", slot, " of sequence ", b, ": ", got);
          }
        }
    }
  CHECK(to.gaps_intact(), "written between elements");
}

TEST(append_rows) {
  for (DType dtype : kDTypes)
    for (Layout from : {Layout::contiguous, Layout::swapped, Layout::gapped, Layout::strided})
      for (Layout to : {Layout::contiguous, Layout::swapped, Layout::gapped, Layout::strided})
        check_append(dtype, from, to);
}

TEST(append_nothing) {
  AppendProblem p;
  append_rows(p);
}

}  // namespace
}  // namespace effops::test
