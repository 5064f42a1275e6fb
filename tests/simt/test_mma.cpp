// The fragments' layout, position by position, and sums.
#include "primitives/mma.h"

#include "primitives/convert.h"
#include "run.h"

namespace effops::test {
namespace {

using namespace device;

// a [16][16] · b [16][8 N] of the types' own values, by one warp that loads its fragments as mma.h tells.
template <class T, int N>
std::vector<float> product(Global<T>& a, Global<T>& b, float before = 0) {
  Global<float> d(16 * 8 * N);
  const T *a_at = a.get(), *b_at = b.get();
  float* d_at = d.get();
  run({1, 32}, [=] {
    const int g = lane_index() / 4, c = lane_index() % 4;
    const auto two = [](const T* from, int step) { return from[0].bits | uint32_t(from[step].bits) << 16; };
    uint32_t fa[4], fb[N][2];
    for (int i = 0; i < 4; ++i) fa[i] = two(a_at + (g + i % 2 * 8) * 16 + 2 * c + i / 2 * 8, 1);
    float sum[N][4];
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < 2; ++i) fb[n][i] = two(b_at + (2 * c + 8 * i) * 8 * N + 8 * n + g, 8 * N);
      for (float& x : sum[n]) x = before;
    }
    mma_row<T>(sum, fa, fb);
    for (int n = 0; n < N; ++n)
      for (int i = 0; i < 4; ++i) d_at[(g + i / 2 * 8) * 8 * N + 8 * n + 2 * c + i % 2] = sum[n][i];
  });
  return {d.get(), d.get() + d.size()};
}

// Every one of a alone against every one of b alone: which positions meet.
template <class T>
void check_layout() {
  const T one = Narrow<T>::of(1.0f), two = Narrow<T>::of(2.0f);
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) {
      Global<T> a(256);
      a[row * 16 + k] = one;
      Global<T> b(128);
      for (int i = 0; i < 128; ++i) b[i] = Narrow<T>::of(float(i + 1));
      const std::vector<float> d = product<T, 1>(a, b);
      for (int i = 0; i < 128; ++i) CHECK(d[i] == (i / 8 == row ? k * 8 + i % 8 + 1 : 0), row, " ", k, " ", i);
    }
  for (int k = 0; k < 16; ++k)
    for (int column = 0; column < 8; ++column) {
      Global<T> a(256), b(128);
      for (int i = 0; i < 256; ++i) a[i] = Narrow<T>::of(float(i));
      b[k * 8 + column] = two;
      const std::vector<float> d = product<T, 1>(a, b, 3);
      for (int i = 0; i < 128; ++i)
        CHECK(d[i] == 3 + (i % 8 == column ? 2 * (i / 8 * 16 + k) : 0), k, " ", column, " ", i);
    }
}

TEST(mma_layout_bf16) { check_layout<bf16>(); }
TEST(mma_layout_f16) { check_layout<f16>(); }

template <class T, int N>
void check_sums() {
  Global<T> a(256), b(128 * N);
  uint32_t state = 1;
  const auto draw = [&] { return Narrow<T>::of(float(int((state = state * 1664525 + 1013904223) >> 24) - 128) / 64); };
  for (int i = 0; i < 256; ++i) a[i] = draw();
  for (int i = 0; i < 128 * N; ++i) b[i] = draw();
  const std::vector<float> d = product<T, N>(a, b, 0.5f);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8 * N; ++column) {
      double sum = 0.5;
      for (int k = 0; k < 16; ++k) sum += double(widen(a[row * 16 + k])) * widen(b[k * 8 * N + column]);
      CHECK(near(d[row * 8 * N + column], sum, 1e-4), row, " ", column);
    }
}

TEST(mma_row_of_tiles) {
  check_sums<bf16, 1>();
  check_sums<bf16, 3>();
  check_sums<f16, 8>();
  check_sums<bf16, 16>();
}

TEST(mma_of_special_values) {
  Global<bf16> a(256), b(128);
  a[0] = Narrow<bf16>::of(INFINITY);
  b[0] = Narrow<bf16>::of(-1);
  b[1] = Narrow<bf16>::of(NAN);
  const std::vector<float> d = product<bf16, 1>(a, b);
  CHECK(d[0] == -INFINITY && std::isnan(d[1]) && std::isnan(d[2]) && std::isnan(d[9]) && d[8] == 0, d[0], " ", d[9]);
}

}  // namespace
}  // namespace effops::test
