// The score of a token by its label, for a list's query heads that lie in shared memory. Scores of labels of few bits
// are integers below 2^24: exact as float32.
#pragma once

#include "common/label_problem.h"
#include "primitives/element.h"
#include "primitives/int8.h"
#include "primitives/reduce.h"

namespace effops::device {

class ListQuery {
 public:
  static int64_t shared_bytes(const LabelSearchProblem& p) {
    return kWarp * 4 + p.rows() * (p.format.channels + 1 + (p.format.bits ? 2 * p.format.items() : 0)) * 4;
  }

  // The threads of a block together.
  __device__ ListQuery(const LabelSearchProblem& p, int64_t b, int64_t list, char* shared)
      : p_(p),
        scratch_(reinterpret_cast<float*>(shared)),
        x_(scratch_ + kWarp),
        less_(reinterpret_cast<int32_t*>(x_ + p.rows() * p.format.channels)),
        words_(less_ + p.rows()) {
    const int64_t head = p.each_head ? list : list * p.group();
    g_ = head / p.group();
    const int channels = static_cast<int>(p.format.channels), count = static_cast<int>(p.rows()) * channels;
    float largest = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const float x = channel(b, head + i / channels, i % channels);
      x_[i] = x;
      largest = max_of(largest, fabsf(x));
    }
    if (p.format.bits == 0) {
      __syncthreads();
      return;
    }
    const float step = query_step(reduce_block(largest, Max(), 0.0f, scratch_));
    for (int row = threadIdx.x; row < p.rows(); row += blockDim.x) {
      int32_t sum = 0;
      for (int c = 0; c < channels; ++c) sum += query_byte(x_[row * channels + c], step);
      less_[row] = sum * p.format.middle();
    }
    const int items = static_cast<int>(p.format.items()), a_word = 32 / p.format.bits;
    for (int i = threadIdx.x; i < p.rows() * items; i += blockDim.x) {
      const int row = i / items, first = i % items * a_word;
      uint32_t low = 0, high = 0;  // four bits: the bytes' low and high numbers; eight: only the first
      for (int c = first; c < first + a_word && c < channels; ++c) {
        const uint32_t byte = static_cast<uint32_t>(query_byte(x_[row * channels + c], step)) & 255;
        const int place = c - first;
        if (p.format.bits == 8) low |= byte << (place * 8);
        else (place % 2 == 0 ? low : high) |= byte << (place / 2 * 8);
      }
      words_[2 * i] = static_cast<int32_t>(low);
      words_[2 * i + 1] = static_cast<int32_t>(high);
    }
    __syncthreads();
  }

  __device__ float score(int64_t b, int64_t token) const {
    const int64_t at = b * p_.labels.batch + token * p_.labels.token + g_ * p_.labels.head;
    if (p_.format.bits == 4) return score_of_words<4>(at);
    if (p_.format.bits == 8) return score_of_words<8>(at);
    switch (p_.format.dtype) {
      case DType::bf16:
        return score_of_numbers<bf16>(at);
      case DType::f16:
        return score_of_numbers<f16>(at);
      default:
        return score_of_numbers<float>(at);
    }
  }

 private:
  __device__ float channel(int64_t b, int64_t head, int64_t c) const {
    const int64_t id = p_.channels.at(g_, c);
    if (id < 0 || id >= p_.dim) return 0;
    const int64_t at = b * p_.q.batch + head * p_.q.head + id * p_.q.dim;
    float x = 0;
    switch (p_.dtype) {
      case DType::f32:
        x = reinterpret_cast<const float*>(p_.q.data)[at];
        break;
      case DType::bf16:
        x = widen(reinterpret_cast<const bf16*>(p_.q.data)[at]);
        break;
      case DType::f16:
        x = widen(reinterpret_cast<const f16*>(p_.q.data)[at]);
        break;
      case DType::f64:
        x = static_cast<float>(reinterpret_cast<const double*>(p_.q.data)[at]);
    }
    return p_.scales.data ? x * p_.scales.at(g_, c) : x;
  }

  template <int kBits>
  __device__ float score_of_words(int64_t at) const {
    const int items = static_cast<int>(p_.format.items());
    const auto* const words = reinterpret_cast<const uint32_t*>(p_.labels.data) + at;
    int32_t best = INT32_MIN;
    for (int row = 0; row < p_.rows(); ++row) {
      const int32_t* const q = words_ + 2 * row * items;
      int32_t sum = kBits == 4 ? -less_[row] : 0;
      for (int i = 0; i < items; ++i) {
        const uint32_t word = words[i * p_.labels.dim];
        if constexpr (kBits == 4) {
          sum = dot_int8(static_cast<int32_t>(word & 0x0f0f0f0fu), q[2 * i], sum);
          sum = dot_int8(static_cast<int32_t>(word >> 4 & 0x0f0f0f0fu), q[2 * i + 1], sum);
        } else {
          sum = dot_int8(static_cast<int32_t>(word ^ 0x80808080u), q[2 * i], sum);
        }
      }
      best = max_of(best, sum);
    }
    return static_cast<float>(best);
  }

  template <class T>
  __device__ float score_of_numbers(int64_t at) const {
    const int channels = static_cast<int>(p_.format.channels);
    const auto* const labels = reinterpret_cast<const T*>(p_.labels.data) + at;
    float best = 0;
    for (int row = 0; row < p_.rows(); ++row) {
      float sum = 0;
      for (int c = 0; c < channels; ++c) sum += x_[row * channels + c] * widen(labels[c * p_.labels.dim]);
      best = row == 0 ? sum : max_of(best, sum);
    }
    return best;
  }

  const LabelSearchProblem& p_;
  float *scratch_, *x_;
  int32_t *less_, *words_;  // [rows]; [rows, items, 2]
  int64_t g_;
};

}  // namespace effops::device
