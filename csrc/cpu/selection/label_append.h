// Writes the labels of new keys.
#pragma once

#include "common/label_problem.h"
#include "common/parallel.h"
#include "cpu/simd/convert.h"

namespace effops::cpu::EFFOPS_ISA {

template <class T, class Label>
void append_head_labels(const LabelAppendProblem& p, const T* key, int64_t g, Label* to) {
  const LabelFormat& f = p.format;
  const int64_t a_word = f.bits == 0 ? 1 : 32 / f.bits;
  uint32_t word = 0;
  for (int64_t c = 0; c < f.channels; ++c) {
    const auto x = static_cast<float>(to_float(key[p.channels.at(g, c) * p.keys.dim]));
    const float offset = p.offsets.data ? p.offsets.at(g, c) : 0;
    if constexpr (std::is_same_v<Label, int32_t>) {
      const int64_t place = c % a_word;
      word |= label_bits(x, p.scales.data ? p.scales.at(g, c) : 1, offset, f.bits) << (place * f.bits);
      if (place < a_word - 1 && c < f.channels - 1) continue;
      to[c / a_word * p.labels.dim] = static_cast<int32_t>(word);
      word = 0;
    } else {
      to[c * p.labels.dim] = from_float<Label>(label_number(x, offset));
    }
  }
}

template <class T, class Label>
void append_labels_of(const LabelAppendProblem& p, const Parallel& parallel) {
  // Tokens go in order: of two that name one slot the later one stays.
  parallel.for_each(p.batch * p.heads, p.tokens > 64, [&](int64_t i) {
    const int64_t b = i / p.heads, g = i % p.heads;
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t slot = p.slots.of(b, t);
      if (slot < 0) continue;
      append_head_labels(
          p, reinterpret_cast<const T*>(p.keys.data) + b * p.keys.batch + t * p.keys.token + g * p.keys.head, g,
          reinterpret_cast<Label*>(p.labels.data) + b * p.labels.batch + slot * p.labels.token + g * p.labels.head);
    }
  });
}

template <class T>
void label_append_typed(const LabelAppendProblem& p, const Parallel& parallel) {
  if (p.format.bits != 0) return append_labels_of<T, int32_t>(p, parallel);
  switch (p.format.dtype) {
    case DType::bf16:
      return append_labels_of<T, bf16>(p, parallel);
    case DType::f16:
      return append_labels_of<T, f16>(p, parallel);
    default:
      return append_labels_of<T, float>(p, parallel);
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
