#include "grouped_case.h"

#include <sstream>

#include "kernel_memory.h"
#include "moe/grouped.h"

namespace effops::test {
namespace {

// By the formulas of common/grouped_problem.h.
double activated(Activation activation, double g, double u) {
  switch (activation) {
    case Activation::none:
      return g * u;
    case Activation::silu:
      return g / (1 + std::exp(-g)) * u;
    case Activation::gelu:
      return g * 0.5 * std::erfc(-g / std::sqrt(2.0)) * u;
    case Activation::gelu_tanh:
      return 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
    case Activation::relu2:
      return std::max(g, 0.0) * std::max(g, 0.0) * u;
    case Activation::swiglu_oai:
      g = std::min(g, 7.0);
      return g / (1 + std::exp(-1.702 * g)) * (std::max(-7.0, std::min(u, 7.0)) + 1);
  }
  return 0;
}

template <class T, class U>
class Forward {
 public:
  explicit Forward(const GroupedCase& c) : c_(c), draw_(c.rows() + 7 * c.in + 31 * c.out) {
    groups_ = static_cast<int>(c.counts.size());
    problem();
    fill();
  }

  void check() {
    std::vector<simt::Extent> extents{x_.extent("x"),
                                      w_.extent("w"),
                                      y_.extent("y", true),
                                      offsets_.extent("offsets"),
                                      order_.extent("order"),
                                      scale_.extent("scale"),
                                      bias_.extent("bias"),
                                      in_sizes_.extent("in_sizes"),
                                      out_sizes_.extent("out_sizes")};
    run_within(extents, c_.text(), [&] { return device::grouped(p_, nullptr, nullptr); });
    int64_t row = 0;
    for (int g = 0; g < groups_; ++g)
      for (int i = 0; i < c_.counts[g]; ++i, ++row)
        for (int j = 0; j < p_.features(); ++j) compare(row, j, expected(g, row, j));
    for (; row < p_.rows; ++row)
      for (int j = 0; j < p_.features(); ++j) compare(row, j, 0);
    for (int64_t i = 0; i < y_.count(); ++i)
      if (i % p_.y_row >= p_.features()) CHECK(std::isnan(y_.value(i)), c_.text(), ": written between rows, at ", i);
  }

 private:
  void problem() {
    constexpr bool bytes = std::is_same_v<U, int8_t>;
    p_.dtype = dtype_of<T>;
    p_.rows = c_.rows();
    p_.in = c_.in;
    p_.out = c_.out;
    p_.groups = groups_;
    p_.activation = c_.activation;
    p_.gated = c_.gated;
    p_.interleaved = c_.interleaved;
    p_.x_row = c_.in + c_.gap;
    p_.y_row = p_.features() + c_.gap;
    const int64_t line = (c_.inputs ? c_.in : c_.out) + c_.gap, lines = c_.inputs ? c_.out : c_.in;
    p_.w_group = lines * line;
    p_.w_in = c_.inputs ? 1 : line;
    p_.w_out = c_.inputs ? line : 1;
    p_.k = std::max(1, c_.choices);
    x_ = Buffer<T>((p_.rows + p_.k - 1) / p_.k * p_.x_row, c_.shift);
    w_ = Buffer<U>(groups_ * p_.w_group, c_.shift);
    y_ = Buffer<T>(p_.rows * p_.y_row, c_.shift);
    offsets_ = Buffer<int32_t>(groups_);
    if (c_.choices) order_ = Buffer<int32_t>(p_.rows);
    if (bytes) scale_ = Buffer<float>(int64_t(groups_) * c_.out);
    if (c_.bias) bias_ = Buffer<T>(int64_t(groups_) * c_.out, c_.shift);
    if (c_.sizes) in_sizes_ = Buffer<int32_t>(groups_), out_sizes_ = Buffer<int32_t>(groups_);
    p_.x = x_.raw();
    p_.w = w_.raw();
    p_.y = y_.raw();
    p_.offsets = offsets_.get();
    p_.order = order_.get();
    p_.scale = scale_.get();
    p_.bias = bias_.raw();
    p_.in_sizes = in_sizes_.get();
    p_.out_sizes = out_sizes_.get();
  }

  int inputs_of(int g) const { return c_.sizes ? in_sizes_[g] : c_.in; }
  int outputs_of(int g) const { return c_.sizes ? out_sizes_[g] : c_.out; }
  int64_t source(int64_t row) const { return c_.choices ? order_[row] / c_.choices : row; }

  // What a group does not have stays NaN, where no other group reads it; activations get halves.
  void fill() {
    const double unit = c_.activation == Activation::none ? 1 : 0.125;
    int end = 0;
    for (int g = 0; g < groups_; ++g) {
      if (c_.sizes) in_sizes_[g] = draw_(0, c_.in), out_sizes_[g] = draw_(0, c_.out);
      offsets_[g] = end += c_.counts[g];
    }
    const int64_t step = p_.rows % 7 == 0 ? 1 : 7;  // whatever the rows are, all come once
    for (int64_t i = 0; c_.choices && i < p_.rows; ++i) order_[i] = static_cast<int32_t>((i * step + 3) % p_.rows);
    int64_t row = 0;
    for (int g = 0; g < groups_; ++g) {
      for (int i = 0; i < c_.counts[g]; ++i, ++row)
        for (int k = 0; k < (c_.choices ? c_.in : inputs_of(g)); ++k)
          x_.set(source(row) * p_.x_row + k, c_.nan && i + k == 0 ? NAN : draw_(-3, 3) * unit);
      for (int k = 0; k < inputs_of(g); ++k)
        for (int f = 0; f < outputs_of(g); ++f) {
          const int64_t at = g * p_.w_group + k * p_.w_in + f * p_.w_out;
          if constexpr (std::is_same_v<U, int8_t>) w_[at] = static_cast<int8_t>(draw_(0, 9) ? draw_(-4, 4) : -128);
          else w_.set(at, draw_(-3, 3) * unit);
        }
      for (int f = 0; f < c_.out; ++f) {
        if (scale_.count()) scale_[int64_t(g) * c_.out + f] = static_cast<float>(0.25 * draw_(1, 3) * unit);
        if (bias_.count() && f < outputs_of(g)) bias_.set(int64_t(g) * c_.out + f, draw_(-9, 9) * unit);
      }
    }
  }

  double weight(int64_t at) const {
    if constexpr (std::is_same_v<U, int8_t>) return w_[at];
    else return w_.value(at);
  }

  double product(int g, int64_t row, int f) const {
    double sum = 0;
    for (int k = 0; k < inputs_of(g); ++k)
      sum += x_.value(source(row) * p_.x_row + k) * weight(g * p_.w_group + k * p_.w_in + f * p_.w_out);
    if (scale_.count()) sum *= scale_[int64_t(g) * c_.out + f];
    if (bias_.count()) sum += bias_.value(int64_t(g) * c_.out + f);
    return sum;
  }
  double expected(int g, int64_t row, int j) const {
    if (j >= outputs_of(g)) return 0;
    if (!c_.gated) return activated(c_.activation, product(g, row, j), 1);
    const int half = c_.out / 2;
    return activated(c_.activation, product(g, row, c_.interleaved ? 2 * j : j),
                     product(g, row, c_.interleaved ? 2 * j + 1 : half + j));
  }

  void compare(int64_t row, int j, double want) const {
    const double got = y_.value(row * p_.y_row + j), rounded = device::widen(device::narrow<T>(float(want)));
    const double unit = std::is_same_v<T, float> ? 0 : std::is_same_v<T, bf16> ? 0x1p-7 : 0x1p-10;
    const double allowed = c_.activation == Activation::none ? 0 : (unit + 1e-5) * std::abs(want) + 1e-6;
    const bool right = std::isnan(want) ? std::isnan(got) : near(got, rounded, allowed);
    CHECK(right, c_.text(), ": row ", row, ", feature ", j, ": ", got, ", expected ", want);
  }

  const GroupedCase& c_;
  Integers draw_;
  int groups_;
  GroupedProblem p_;
  Buffer<T> x_, y_, bias_;
  Buffer<U> w_;
  Buffer<float> scale_;
  Buffer<int32_t> offsets_, order_, in_sizes_, out_sizes_;
};

}  // namespace

std::string GroupedCase::text() const {
  std::ostringstream o;
  o << "groups of";
  for (int n : counts) o << " " << n;
  o << " and " << rest << " more, " << in << " to " << out << (inputs ? " by columns" : " by inputs");
  if (shift) o << ", shifted by " << shift;
  if (gap) o << ", gaps of " << gap;
  if (choices) o << ", gathered of " << choices;
  if (bias) o << ", bias";
  if (sizes) o << ", sizes";
  if (nan) o << ", NaN";
  if (gated) o << ", gated";
  if (interleaved) o << ", interleaved";
  if (activation != Activation::none) o << ", activation " << int(activation);
  return o.str();
}

template <class T, class U>
void check_grouped(const GroupedCase& c) {
  Forward<T, U>(c).check();
}
template void check_grouped<float, float>(const GroupedCase&);
template void check_grouped<bf16, bf16>(const GroupedCase&);
template void check_grouped<f16, f16>(const GroupedCase&);
template void check_grouped<float, int8_t>(const GroupedCase&);
template void check_grouped<bf16, int8_t>(const GroupedCase&);
template void check_grouped<f16, int8_t>(const GroupedCase&);

}  // namespace effops::test
