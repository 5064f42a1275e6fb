// append_rows and commit_rows: the cache after them, byte by byte.
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
  p.from = from.view();
  p.to = to.view();
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

// In pages of two tokens that lie in another order.
TEST(append_rows_in_pages) {
  Random random(18);
  Tensor from(DType::f32, {2, 3, 2, 5}), to(DType::f32, {5, 2, 2, 5}, Layout::swapped);
  from.fill(random);
  from.freeze();
  const List<int32_t> slots(std::vector<int32_t>{0, 3, -1, 2, 1, 0}), table(std::vector<int32_t>{4, 0, 2, 1});
  AppendProblem p;
  p.batch = 2;
  p.tokens = 3;
  p.heads = 2;
  p.dim = 5;
  p.bytes = 4;
  p.from = from.view();
  p.to = to.view();
  p.pages = {table.get(), 2, 0, 1, 2};
  p.slots = {slots.get(), 3, 1};
  append_rows(p);
  int written = 0;
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t t = 0; t < 3; ++t) {
      const int64_t slot = slots.get()[b * 3 + t];
      if (slot < 0) continue;
      for (int64_t h = 0; h < 2; ++h)
        for (int64_t d = 0; d < 5; ++d)
          CHECK(to.get(table.get()[b * 2 + slot / 2], slot % 2, h, d) == from.get(b, t, h, d), "token ", t, " of ", b);
      ++written;
    }
  for (int64_t page = 0; page < 5; ++page)
    for (int64_t j = 0; j < 2; ++j) written -= !std::isnan(to.get(page, j, 0, 0));
  CHECK(written == 0 && to.gaps_intact(), "written elsewhere");
}

// Overlapping moves: 0 2 3 5 from slot 1 on.
TEST(commit_rows) {
  for (DType dtype : kDTypes)
    for (Layout layout : {Layout::contiguous, Layout::swapped, Layout::gapped, Layout::strided}) {
      Random random(19);
      Tensor cache(dtype, {2, 8, 2, 3}, layout), before(dtype, {2, 8, 2, 3}, layout);
      cache.fill(random);
      std::memcpy(before.data(), cache.data(), cache.bytes());
      const List<int32_t> nodes(std::vector<int32_t>{0, 2, 3, 5, 1, -1, -1, -1}), starts(std::vector<int32_t>{1, 6});
      CommitProblem p;
      p.batch = 2;
      p.nodes_a_row = 4;
      p.heads = 2;
      p.dim = 3;
      p.bytes = static_cast<int64_t>(size_of(dtype));
      p.cache = cache.view();
      p.nodes = {nodes.get(), 4, 1};
      p.starts = starts.get();
      commit_rows(p);
      for (int64_t b = 0; b < 2; ++b)
        for (int64_t slot = 0; slot < 8; ++slot) {
          const int64_t j = slot - starts.get()[b];
          const bool moved = j >= 0 && j < 4 && nodes.get()[b * 4 + j] >= 0;
          const int64_t from = moved ? starts.get()[b] + nodes.get()[b * 4 + j] : slot;
          for (int64_t h = 0; h < 2; ++h)
            for (int64_t d = 0; d < 3; ++d)
              CHECK(cache.get(b, slot, h, d) == before.get(b, from, h, d), "slot ", slot, " of sequence ", b);
        }
      CHECK(cache.gaps_intact(), "written between elements");
    }
}

TEST(append_nothing) {
  AppendProblem p;
  append_rows(p);
}

}  // namespace
}  // namespace effops::test
