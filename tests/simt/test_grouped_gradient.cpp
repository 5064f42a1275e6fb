// Weight gradients of grouped products.
#include "grouped_case.h"
#include "planted.h"

namespace effops::test {
namespace {

GroupedCase base(int in, int out) {
  GroupedCase c;
  c.counts = {0, 3, 70, 0, 33};
  c.rest = 2;
  c.in = in;
  c.out = out;
  return c;
}

template <class T>
void check_all() {
  check_grouped_gradient<T>(base(72, 136));
  check_grouped_gradient<T>(base(136, 24));
  GroupedCase odd = base(37, 19);
  odd.gap = 3;
  odd.shift = 1;
  check_grouped_gradient<T>(odd);
  GroupedCase sizes = base(40, 72);
  sizes.sizes = true;
  check_grouped_gradient<T>(sizes);
  sizes.nan = true;
  check_grouped_gradient<T>(sizes);
  sizes.counts = {160};  // the pipeline goes round
  check_grouped_gradient<T>(sizes);
}
TEST(grouped_gradient_f32) { check_all<float>(); }
TEST(grouped_gradient_bf16) { check_all<bf16>(); }
TEST(grouped_gradient_f16) { check_all<f16>(); }

TEST(grouped_gradient_of_nothing) {
  GroupedCase c = base(5, 9);
  c.counts = {0, 0};
  check_grouped_gradient<bf16>(c);
  c.counts = {};
  check_grouped_gradient<float>(c);
}

TEST(grouped_gradient_in_several_orders) {
  in_several_orders([](const char*) {
    check_grouped_gradient<bf16>(base(24, 40));
    check_grouped_gradient<float>(base(24, 40));
  });
}

TEST(grouped_gradient_reads_without_bank_conflicts) {
  check_grouped_gradient<bf16>(base(136, 72));
  CHECK(simt::last_bank_conflicts() == 0, simt::last_bank_conflicts());
}

}  // namespace
}  // namespace effops::test
