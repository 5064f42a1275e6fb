// Grouped products: every kernel, at shapes where rows, inputs and outputs do not fill a tile.
#include "grouped_case.h"
#include "planted.h"

namespace effops::test {
namespace {

// Rows a group of each tile shape: few, some, many. Groups without rows, one that fills a tile, one that goes past it.
const std::vector<std::vector<int>> kCounts = {{0, 3, 17, 0, 1, 0}, {20, 0, 64, 9}, {150, 0, 131}};

GroupedCase base(size_t shape, int in, int out, bool inputs) {
  GroupedCase c;
  c.counts = kCounts[shape];
  c.rest = 2;
  c.in = in;
  c.out = out;
  c.inputs = inputs;
  return c;
}

template <class T>
void check_shapes() {
  for (size_t shape = 0; shape < kCounts.size(); ++shape)
    for (bool inputs : {true, false}) {
      check_grouped<T, T>(base(shape, 72, 136, inputs));  // in 16-byte pieces, across tiles
      GroupedCase odd = base(shape, 37, 19, inputs);
      odd.bias = true;
      odd.gap = 2;
      check_grouped<T, T>(odd);
    }
}
TEST(grouped_shapes_f32) { check_shapes<float>(); }
TEST(grouped_shapes_bf16) { check_shapes<bf16>(); }
TEST(grouped_shapes_f16) { check_shapes<f16>(); }

// The pipeline is longer than some of these, and none of its steps may be left over.
template <class T>
void check_depths() {
  for (int in : {1, 8, 33, 64, 65, 200})
    for (bool inputs : {true, false}) check_grouped<T, T>(base(0, in, 24, inputs));
}
TEST(grouped_depths_f32) { check_depths<float>(); }
TEST(grouped_depths_bf16) { check_depths<bf16>(); }

template <class T>
void check_bytes() {
  for (size_t shape : {0, 1})
    for (bool inputs : {true, false}) {
      GroupedCase c = base(shape, 96, 80, inputs);
      c.bias = true;
      check_grouped<T, int8_t>(c);
      c.in = 35;
      c.out = 21;
      c.shift = 1;
      check_grouped<T, int8_t>(c);
      c = base(shape, 64, 96, inputs);
      c.gated = true;
      check_grouped<T, int8_t>(c);
      c.interleaved = true;
      check_grouped<T, int8_t>(c);
    }
}
TEST(grouped_bytes_f32) { check_bytes<float>(); }
TEST(grouped_bytes_bf16) { check_bytes<bf16>(); }
TEST(grouped_bytes_f16) { check_bytes<f16>(); }

template <class T>
void check_gather_and_sizes() {
  for (bool inputs : {true, false})
    for (int shift : {0, 1}) {
      GroupedCase c = base(0, 40, 72, inputs);
      c.choices = 2;
      c.shift = shift;
      check_grouped<T, T>(c);
      c.choices = 0;
      c.sizes = true;
      c.bias = true;
      check_grouped<T, T>(c);
      c.nan = true;
      check_grouped<T, T>(c);
    }
}
TEST(grouped_gather_and_sizes_f32) { check_gather_and_sizes<float>(); }
TEST(grouped_gather_and_sizes_bf16) { check_gather_and_sizes<bf16>(); }

template <class T>
void check_gates() {
  for (size_t shape = 0; shape < kCounts.size(); ++shape)
    for (bool inputs : {true, false})
      for (bool interleaved : {false, true}) {
        GroupedCase c = base(shape, 24, 2 * 74, inputs);  // halves that are no multiple of a piece
        c.gated = true;
        c.interleaved = interleaved;
        c.choices = 3;
        c.bias = true;
        check_grouped<T, T>(c);
        c.out = 2 * 72;
        c.activation = Activation::silu;
        check_grouped<T, T>(c);
      }
}
TEST(grouped_gates_f32) { check_gates<float>(); }
TEST(grouped_gates_bf16) { check_gates<bf16>(); }

TEST(grouped_activations) {
  for (Activation activation :
       {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu2, Activation::swiglu_oai})
    for (bool gated : {false, true}) {
      GroupedCase c = base(0, 70, 22, true);
      c.activation = activation;
      c.gated = gated;
      c.bias = true;
      check_grouped<float, float>(c);
      check_grouped<bf16, bf16>(c);
      check_grouped<f16, int8_t>(c);
    }
}

TEST(grouped_of_nothing) {
  GroupedCase c;
  c.rest = 5;  // no groups
  c.in = 3;
  c.out = 9;
  check_grouped<bf16, bf16>(c);
  check_grouped<float, float>(c);
  c.counts = std::vector<int>(70, 0);  // of three rounds of looking
  check_grouped<bf16, bf16>(c);
  c.counts[66] = 3;
  c.counts[31] = 1;
  check_grouped<bf16, bf16>(c);
  c.in = 0;
  c.bias = true;
  check_grouped<bf16, bf16>(c);
  check_grouped<float, float>(c);
}

TEST(grouped_in_several_orders) {
  in_several_orders([](const char*) {
    check_grouped<bf16, bf16>(base(1, 136, 40, false));
    check_grouped<bf16, int8_t>(base(0, 136, 40, true));
    check_grouped<float, float>(base(0, 72, 24, true));
  });
}

TEST(grouped_reads_without_bank_conflicts) {
  for (size_t shape = 0; shape < kCounts.size(); ++shape)
    for (bool inputs : {true, false}) {
      check_grouped<bf16, bf16>(base(shape, 72, 136, inputs));
      CHECK(simt::last_bank_conflicts() == 0, shape, " ", inputs, ": ", simt::last_bank_conflicts());
    }
}

TEST(grouped_with_any_offsets) {
  for (const auto& offsets : std::vector<std::vector<int32_t>>{
           {40, 3, 20}, {-5, 70, 20}, {INT32_MAX, INT32_MIN, INT32_MAX}, {0, 0, 1 << 20}, {-1, -1, -1}}) {
    run_with_offsets<float>(offsets, 20);
    run_with_offsets<bf16>(offsets, 20);
  }
}

}  // namespace
}  // namespace effops::test
