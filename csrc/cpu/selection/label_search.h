// The tokens that labels say a query attends to most, list by list.
#pragma once

#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/selection/label_keys.h"
#include "cpu/selection/list.h"

namespace effops::cpu::EFFOPS_ISA {

// The working memory of a list.
template <class T>
struct LabelScratch {
  float* x;
  int16_t* coarse;
  int32_t *fine, *equals;
  T* stage;
  int32_t* sums;

  LabelScratch(const LabelSearchProblem& p, int64_t tokens, Carver& memory)
      : x(memory.take<float>(p.rows() * p.format.channels)),
        coarse(memory.take<int16_t>(tokens + kKeyTokens)),
        fine(keys_are_short(p.format) ? nullptr : memory.take<int32_t>(tokens + kKeyTokens)),
        equals(keys_are_short(p.format) ? nullptr : memory.take<int32_t>(tokens)),
        stage(memory.take<T>(kKeyTokens)),
        sums(memory.take<int32_t>(kKeyTokens)) {}
};

// Keys of tokens [r.first, r.last).
template <class T>
void label_keys(const LabelSearchProblem& p, int64_t b, int64_t list, const SelectionRange& r, const LabelScratch<T>& s,
                const QueryBytes* bytes) {
  const LabelPlanes<T> planes(p, b, p.each_head ? list / p.group() : list);
  const int shift = short_key_shift(p.format);
  for (int64_t j = r.first; j < r.last; j += kKeyTokens) {
    const int64_t n = std::min<int64_t>(kKeyTokens, r.last - j), at = j - r.first;
    auto plane = [&](int64_t item) { return planes.plane(item, j, n, s.stage); };
    if constexpr (std::is_same_v<T, int32_t>) {
      if (keys_are_short(p.format)) {
        short_keys(plane(0), n, *bytes, p.rows(), s.coarse + at);
        continue;
      }
      if (p.format.bits == 4) {
        word_keys<1>(n, p.format.items(), *bytes, p.rows(), s.sums, s.fine + at, plane);
      } else {
        word_keys<16>(n, p.format.items(), *bytes, p.rows(), s.sums, s.fine + at, plane);
      }
    } else {
      number_keys<T>(n, p.format.channels, s.x, p.rows(), reinterpret_cast<float*>(s.sums), s.fine + at, plane);
    }
    for (int64_t i = at; i < at + n; ++i) s.coarse[i] = static_cast<int16_t>(s.fine[i] >> shift);
  }
}

template <class T>
void label_list(const LabelSearchProblem& p, int64_t b, int64_t list, int32_t* to) {
  const SelectionRange r = range_of(p, b);
  int32_t* const end = to + p.count;
  to = write_list(r, to, [&](int32_t* free) {
    const int64_t head = p.each_head ? list : list * p.group();
    auto carve = [&](Carver& memory, bool measure, auto then) {
      const LabelScratch<T> s(p, r.candidates(), memory);
      if constexpr (std::is_same_v<T, int32_t>) {
        const QueryBytes bytes(p, b, head, memory, measure ? nullptr : s.x);
        then(s, &bytes);
      } else {
        then(s, nullptr);
      }
    };
    Carver size;
    carve(size, true, [](const auto&, auto) {});
    Carver memory(thread_scratch(Scratch::task, size.used()));
    carve(memory, false, [&](const LabelScratch<T>& s, const QueryBytes* bytes) {
      if (bytes == nullptr)
        for (int64_t i = 0; i < p.rows() * p.format.channels; ++i)
          s.x[i] = query_channel(p, b, head + i / p.format.channels, i % p.format.channels);
      label_keys(p, b, list, r, s, bytes);
      free = write_top({s.coarse, s.fine, r.candidates()}, r.free, r.first, s.equals, free);
    });
    return free;
  });
  std::fill(to, end, -1);
}

template <class T>
void label_search_of(const LabelSearchProblem& p, const Parallel& parallel) {
  const int64_t lists = p.lists();
  parallel.for_each(p.batch * lists, p.batch * lists * p.capacity > 16384, [&](int64_t i) {
    const int64_t b = i / lists, list = i % lists;
    label_list<T>(p, b, list, p.indices + i * p.count);
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
