#include "common/evict.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "common/append.h"
#include "common/scratch.h"

namespace effops {
namespace {

constexpr int64_t kSerialSlots = 1 << 14;  // below this threads cost more than they give
constexpr int32_t kSkipped = -1, kNone = -2;

int64_t offset_of(const RowView& x, int64_t b, int64_t slot, int64_t g) {
  return b * x.batch + slot * x.token + g * x.head;
}
template <class T>
T* row_of(const RowView& x, int64_t b, int64_t g) {
  return reinterpret_cast<T*>(x.data) + offset_of(x, b, 0, g);
}

// Masses as integers in the same order, so that loops over them are those of integers, which compilers turn into
// vectors.
int32_t order_of(float mass) {
  const auto bits = std::bit_cast<int32_t>(mass + 0.0f);  // both zeros are one
  return bits ^ (bits >> 31 & INT32_MAX);
}
int64_t order_of(double mass) {
  const auto bits = std::bit_cast<int64_t>(mass + 0.0);
  return bits ^ (bits >> 63 & INT64_MAX);
}

// The entries of a KV head as they change from token to token, in memory of the plan's own.
template <class M>
class Entries {
  using Order = decltype(order_of(M()));
  static constexpr Order kNever = std::numeric_limits<Order>::max();  // above infinity

 public:
  Entries(const EvictProblem& p, int64_t b, int64_t g) : p_(p) {
    const auto carve = [&](Carver c) {
      order_ = c.take<Order>(p.slots);
      positions_ = c.take<int32_t>(p.slots);
      return c.used();
    };
    const size_t bytes = carve(Carver());
    carve(Carver(thread_scratch(Scratch::task, bytes)));
    load(row_of<M>(p.mass, b, g), p.mass.token, row_of<int32_t>(p.positions, b, g), p.positions.token);
  }

  int32_t take(int64_t new_position) {
    while (free_ < p_.slots && positions_[free_] >= 0) ++free_;
    const int64_t slot = free_ < p_.slots ? free_ : slot_to_go(new_position);
    if (slot < 0) return kNone;
    order_[slot] = 0;
    positions_[slot] = static_cast<int32_t>(new_position);
    return static_cast<int32_t>(slot);
  }

 private:
  void load(const M* mass, int64_t mass_step, const int32_t* positions, int64_t position_step) {
    const auto copy = [&](int64_t m, int64_t p) {
      for (int64_t j = 0; j < p_.slots; ++j) {
        order_[j] = order_of(rank_of(mass[j * m], std::numeric_limits<M>::infinity()));
        positions_[j] = positions[j * p];
      }
    };
    mass_step == 1 && position_step == 1 ? copy(1, 1) : copy(mass_step, position_step);
  }

  int64_t slot_to_go(int64_t new_position) const {
    const int32_t low = p_.first_to_go(), high = p_.last_to_go(new_position);
    Order least = kNever;
    for (int64_t j = 0; j < p_.slots; ++j) {
      const bool may = positions_[j] >= low && positions_[j] <= high;
      least = std::min(least, may ? order_[j] : kNever);
    }
    if (least == kNever) return -1;
    int32_t oldest = INT32_MAX;
    for (int64_t j = 0; j < p_.slots; ++j) {
      const bool may = order_[j] == least && positions_[j] >= low && positions_[j] <= high;
      oldest = std::min(oldest, may ? positions_[j] : INT32_MAX);
    }
    int64_t slot = 0;
    while (order_[slot] != least || positions_[slot] != oldest) ++slot;
    return slot;
  }

  const EvictProblem& p_;
  Order* order_;
  int32_t* positions_;
  int64_t free_ = 0;  // slots below it are taken
};

template <class M>
void plan_head(const EvictProblem& p, int64_t b, int64_t g, int32_t* to) {
  Entries<M> entries(p, b, g);
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t position = p.new_positions.of(b, t);
    to[t] = position < 0 ? kSkipped : entries.take(position);
  }
}

template <class M>
void write_head(const EvictProblem& p, int64_t b, int64_t g, const int32_t* slots) {
  const auto copy = [&](const TensorView4& from, const TensorView4& to, int64_t dim, int64_t t) {
    copy_row(from.data + (b * from.batch + t * from.token + g * from.head) * p.bytes, from.dim,
             to.data + (b * to.batch + slots[t] * to.token + g * to.head) * p.bytes, to.dim, dim, p.bytes);
  };
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (slots[t] < 0) continue;
    copy(p.k, p.k_cache, p.k_dim, t);
    copy(p.v, p.v_cache, p.v_dim, t);
    row_of<M>(p.mass, b, g)[slots[t] * p.mass.token] = 0;
    row_of<int32_t>(p.positions, b, g)[slots[t] * p.positions.token] = static_cast<int32_t>(p.new_positions.of(b, t));
  }
}

}  // namespace

std::vector<int32_t> plan_evictions(const EvictProblem& p, const Parallel& parallel) {
  std::vector<int32_t> slots(p.batch * p.heads * p.tokens);
  parallel.for_each(p.batch * p.heads, p.batch * p.heads * p.slots * p.tokens > kSerialSlots, [&](int64_t i) {
    int32_t* const to = slots.data() + i * p.tokens;
    p.mass_dtype == DType::f64 ? plan_head<double>(p, i / p.heads, i % p.heads, to)
                               : plan_head<float>(p, i / p.heads, i % p.heads, to);
  });
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] != kNone) continue;
    const int64_t at = static_cast<int64_t>(i), t = at % p.tokens, g = at / p.tokens % p.heads;
    std::ostringstream message;
    message << "append_evicting: positions: expected a free slot or an entry that may be evicted for every token, got "
            << "none for token " << t << " in KV head " << g << " of sequence " << at / p.tokens / p.heads;
    throw std::runtime_error(message.str());
  }
  return slots;
}

void append_evicting(const EvictProblem& p, const Parallel& parallel) {
  const std::vector<int32_t> slots = plan_evictions(p, parallel);
  const int64_t elements = p.batch * p.heads * p.tokens * (p.k_dim + p.v_dim);
  parallel.for_each(p.batch * p.heads, elements > kSerialSlots, [&](int64_t i) {
    const int32_t* const own = slots.data() + i * p.tokens;
    p.mass_dtype == DType::f64 ? write_head<double>(p, i / p.heads, i % p.heads, own)
                               : write_head<float>(p, i / p.heads, i % p.heads, own);
  });
}

}  // namespace effops
