// Calls of the grouped kernels, compared with plain loops. Values are small integers, so that sums are exact.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "common/grouped_problem.h"

namespace effops::test {

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float>  ? DType::f32
                           : std::is_same_v<T, bf16> ? DType::bf16
                                                     : DType::f16;

struct GroupedCase {
  std::vector<int> counts;  // rows of each group
  int rest = 0;             // rows past the last group
  int in = 1, out = 1;
  bool inputs = true;  // inputs of an output feature are neighbours in w
  int shift = 0;       // of all addresses, in elements
  int gap = 0;         // elements between rows
  int choices = 0;     // rows come from tokens that have so many
  bool bias = false, sizes = false;
  bool nan = false;  // in one place of each group's first row
  Activation activation = Activation::none;
  bool gated = false, interleaved = false;

  std::string text() const;
  int64_t rows() const {
    int64_t sum = rest;
    for (int c : counts) sum += c;
    return sum;
  }
};

// U: float, bf16, f16 as T, or int8_t with scales.
template <class T, class U>
void check_grouped(const GroupedCase& c);

template <class T>
void check_grouped_gradient(const GroupedCase& c);

// A call whose offsets are these, whatever they are: it has to stay inside its memory.
template <class T>
void run_with_offsets(const std::vector<int32_t>& offsets, int rows);

}  // namespace effops::test
