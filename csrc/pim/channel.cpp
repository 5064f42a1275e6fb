#include "pim/channel.h"

#include <algorithm>
#include <deque>
#include <limits>

namespace effops::pim {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max() / 4;
constexpr int64_t kPast = -(int64_t{1} << 40);
constexpr int64_t kWindow = 8;  // rows that ordinary accesses open ahead

struct RowBuffer {
  int64_t row = -1;
  int64_t column_ok = kPast, precharge_ok = kPast, activate_ok = kPast;
};

// The last four activations of a rank: no five may lie within tFAW.
class PowerWindow {
 public:
  // When `activations` more may start; beyond four they follow window after window.
  int64_t earliest(int64_t activations, int64_t tFAW) const {
    return at_[4 - std::min<int64_t>(activations, 4)] + tFAW;
  }
  void add(int64_t cycle, int64_t activations, int64_t tFAW) {
    for (int64_t i = 0; i < activations; ++i) {
      std::rotate(at_.begin(), at_.end() - 1, at_.end());
      at_[0] = cycle + i / 4 * tFAW;
    }
  }

 private:
  std::array<int64_t, 4> at_{kPast, kPast, kPast, kPast};  // newest first
};

struct Rank {
  PowerWindow window, grouped;  // of all activations; of grouped ones
  int64_t last_activate = kPast;
  std::vector<int64_t> group_activate, group_column;  // last of each bank group
};

struct Candidate {
  int64_t at = kNever;
  Command command;
};

class Channel {
 public:
  Channel(const Device& device, const ChannelWork& work, std::vector<Command>* trace)
      : m_(device.memory), t_(device.timing), p_(device.pim), work_(work), trace_(trace) {
    ranks_.resize(m_.ranks);
    for (Rank& r : ranks_) {
      r.group_activate.assign(m_.bank_groups, kPast);
      r.group_column.assign(m_.bank_groups, kPast);
    }
    banks_.resize(m_.banks());
    group_write_.assign(m_.ranks * m_.bank_groups, kPast);
    const int64_t bundles = device.bundles();
    const bool sections = bundles > 1 && work.near_accesses > 0 && !work.transfers.empty();
    // Beside a near processor ordinary accesses keep to the other half of its bundles, as data are placed for it.
    for (int64_t i = 0; i < m_.banks(); ++i) {  // neighbours lie in different groups: tCCD_S and tRRD_S between them
      const int64_t in_rank = i % m_.banks_per_rank();
      const int64_t b = i - in_rank + in_rank % m_.bank_groups * m_.banks_per_group + in_rank / m_.bank_groups;
      if (!sections || b / p_.banks_per_access % 2 == 1) order_.push_back(b);
    }
    for (int64_t i = 0; i < bundles; ++i)
      if (!sections || i % 2 == 0) bundles_.push_back(i);
    // Neighbours in time lie in different ranks, so that one opens while another is read.
    if (m_.ranks > 1 && bundles_.size() > 1)
      std::stable_sort(bundles_.begin(), bundles_.end(), [&](int64_t a, int64_t b) {
        const int64_t per_rank = std::max<int64_t>(1, m_.banks_per_rank() / p_.banks_per_access);
        return a % per_rank < b % per_rank;
      });
    near_.resize(bundles);
    near_to_open_ = work.near_accesses;
    due_ = work.refresh ? t_.tREFI : kNever;
  }

  ChannelReport run() {
    while (true) {
      fill_window();
      if (now_ >= due_) draining_ = true;
      Candidate best = next_gemv();
      const auto consider = [&](const Candidate& c) {
        if (c.at < best.at) best = c;
      };
      consider(next_access());
      consider(next_near());
      if (best.at >= kNever) {
        if (!draining_) break;
        refresh();
        continue;
      }
      issue(best);
    }
    return report_;
  }

 private:
  // The buses
  int bus_of(Op op) const {
    switch (op) {
      case Op::near_activate:
      case Op::near_read:
      case Op::near_precharge:
        return 2;
      case Op::read:
      case Op::write:
      case Op::comp:
      case Op::result:
        return m_.command_buses == 2 ? 1 : 0;
      default:
        return 0;
    }
  }
  int64_t rank_of(int64_t bank) const { return bank / m_.banks_per_rank(); }
  int64_t group_of(int64_t bank) const { return bank % m_.banks_per_rank() / m_.banks_per_group; }
  Candidate candidate(Op op, int64_t bank, int64_t row, int64_t at, int64_t count = 1) const {
    Candidate c;
    c.at = std::max({at, bus_free_[bus_of(op)], int64_t{0}});
    c.command = {0, op, int32_t(rank_of(bank)), int32_t(bank % m_.banks_per_rank()), row, count};
    return c;
  }
  int64_t data_at(int64_t rank, int64_t burst_rank) const {
    return data_free_ + (burst_rank >= 0 && burst_rank != rank ? t_.tRTRS : 0);
  }
  // Of the rank's limits alone.
  int64_t activate_at(int64_t bank, int64_t activations, bool grouped = false) const {
    const Rank& r = ranks_[rank_of(bank)];
    const PowerWindow& window = grouped && !p_.window_shared ? r.grouped : r.window;
    return std::max({r.last_activate + t_.tRRD_S, r.group_activate[group_of(bank)] + t_.tRRD_L,
                     window.earliest(activations, t_.tFAW)});
  }
  void activated(int64_t bank, int64_t cycle, int64_t activations) {
    Rank& r = ranks_[rank_of(bank)];
    const int64_t last = cycle + (activations - 1) / 4 * t_.tFAW;  // four by four
    r.window.add(cycle, activations, t_.tFAW);
    r.last_activate = last;
    r.group_activate[group_of(bank)] = last;
  }

  // Ordinary accesses
  struct Visit {
    int64_t bank, row, left;
    bool write, open = false;
  };

  // Whether the units or the near processor have the banks' only row buffers.
  bool blocked() const {
    if (p_.kind == PimKind::banks) return p_.row_buffers == 1 && !gemv_done();
    return near_.size() == 1 && (near_to_open_ > 0 || !near_open_.empty());
  }

  void fill_window() {
    while (static_cast<int64_t>(window_.size()) < std::min<int64_t>(kWindow, order_.size()) &&
           transfer_ < work_.transfers.size()) {
      const Transfer& t = work_.transfers[transfer_];
      const int64_t left = std::min(m_.accesses_per_row(), t.accesses - transferred_);
      if (left > 0) {
        const int64_t n = static_cast<int64_t>(order_.size());
        window_.push_back({order_[visits_ % n], visits_ / n % m_.rows, left, t.write});
        ++visits_;
        transferred_ += left;
      }
      if (transferred_ == t.accesses) ++transfer_, transferred_ = 0;
    }
  }

  Candidate next_access() const {
    Candidate best;
    if (!closing_.empty()) {
      const int64_t bank = closing_.front();
      best = candidate(Op::precharge, bank, banks_[bank].row, banks_[bank].precharge_ok);
    }
    if (blocked()) return best;
    for (const Visit& v : window_) {
      if (v.open) continue;
      const bool taken = banks_[v.bank].row >= 0 || (v.bank == vector_bank() && gwrite_waits());
      if (!draining_ && !taken) {
        const Candidate c =
            candidate(Op::activate, v.bank, v.row, std::max(banks_[v.bank].activate_ok, activate_at(v.bank, 1)));
        if (c.at < best.at) best = c;
      }
      break;  // rows open in order
    }
    // Rows in different groups by turns, where one group cannot keep the data bus busy.
    const int64_t turns = (t_.tCCD_L + t_.burst - 1) / t_.burst;
    for (int64_t i = 0; i < std::min<int64_t>(turns, window_.size()); ++i) {
      const Visit& v = window_[i];
      if (!v.open || v.write != window_.front().write) break;
      const Candidate c = next_column(v);
      if (c.at < best.at || (i == 0 && c.at == best.at)) best = c;
    }
    return best;
  }

  Candidate next_column(const Visit& v) const {
    const Rank& r = ranks_[rank_of(v.bank)];
    const int64_t latency = v.write ? t_.tCWL : t_.tCL;
    int64_t at = std::max({banks_[v.bank].column_ok, r.group_column[group_of(v.bank)] + t_.tCCD_L,
                           last_column_ + t_.tCCD_S, data_at(rank_of(v.bank), data_rank_) - latency});
    if (!v.write) at = std::max({at, write_end_ + t_.tWTR_S, group_write_[v.bank / m_.banks_per_group] + t_.tWTR_L});
    else if (!last_was_write_) at = std::max(at, data_free_ + t_.tRTRS - latency);
    return candidate(v.write ? Op::write : Op::read, v.bank, v.row, at);
  }

  // Units at the banks
  bool gemv_done() const { return step_ >= work_.gemv.size(); }
  int64_t vector_bank() const { return order_.back(); }
  bool gwrite_waits() const { return !gemv_done() && work_.gemv[step_].gwrite; }
  int64_t groups() const { return m_.banks() / p_.banks_per_activation; }
  int64_t tile_estimate(const GemvStep& s) const {
    return (groups() / m_.ranks) * t_.tFAW + t_.tRCD +
           s.sums * (std::max(s.comps_per_sum, p_.least_comps) + 1) * p_.comp_interval + t_.tRTP + t_.tRP + 32;
  }

  Candidate next_gemv() {
    if (gemv_done()) return {};
    const GemvStep& s = work_.gemv[step_];
    const bool starts = phase_ == 0;
    if (starts) {
      const int64_t need = s.gwrite ? t_.tRCD + p_.gwrite_cycles + t_.tRP : tile_estimate(s);
      if (std::max(now_, comp_free_) + need > due_ && need < t_.tREFI - t_.tRFC) draining_ = due_ < kNever;
      if (draining_) return {};
    }
    if (s.gwrite) {  // opens, copies and closes a row of the vector's bank
      const int64_t bank = vector_bank();
      if (banks_[bank].row >= 0) return {};
      const int64_t at = std::max({banks_[bank].activate_ok, activate_at(bank, 1), comp_free_ - t_.tRCD});
      return candidate(Op::gwrite, bank, 0, at);
    }
    if (s.sums <= 0) {
      ++step_;
      return next_gemv();
    }
    int64_t phase = phase_;
    if (p_.composite && phase-- == 0)
      return candidate(Op::header, 0, row_, std::max(pim_activate_ok_, int64_t{0}), s.sums);
    if (phase < groups()) {
      const int64_t rank = phase % m_.ranks;
      const int64_t bank = rank * m_.banks_per_rank() + phase / m_.ranks * p_.banks_per_activation;
      int64_t at = std::max(pim_activate_ok_, activate_at(bank, p_.banks_per_activation, true));
      if (p_.row_buffers == 1)
        for (const RowBuffer& b : banks_) {
          if (b.row >= 0) return {};
          at = std::max(at, b.activate_ok);
        }
      return candidate(Op::group_activate, bank, row_, at, p_.banks_per_activation);
    }
    phase -= groups();
    const int64_t commands = p_.composite ? 1 : std::max<int64_t>(1, s.comps_per_sum);
    if (phase < s.sums * (commands + 1)) {
      const int64_t k = phase % (commands + 1);
      if (k < commands)
        return candidate(Op::comp, 0, row_, std::max(pim_column_ok_, comp_free_), p_.composite ? s.comps_per_sum : 1);
      const int64_t bursts = (p_.result_bytes * m_.banks() + m_.access_bytes - 1) / m_.access_bytes;
      return candidate(Op::result, 0, row_, std::max({sum_ok_, result_free_, data_at(-1, -1) - t_.tCL}), bursts);
    }
    return candidate(Op::pim_precharge, 0, row_, pim_precharge_ok_);
  }

  void gemv_issued(const Command& c) {
    const GemvStep& s = work_.gemv[step_];
    ++phase_;
    switch (c.op) {
      case Op::gwrite: {
        const int64_t bank = vector_bank();
        activated(bank, c.cycle, 1);
        const int64_t end = c.cycle + t_.tRCD + p_.gwrite_cycles;
        banks_[bank].activate_ok = std::max(end, c.cycle + t_.tRAS) + t_.tRP;
        comp_free_ = std::max(comp_free_, end);
        effect(end, report_.gemv_cycles);
        break;
      }
      case Op::group_activate:
        activated(c.rank * m_.banks_per_rank() + c.bank, c.cycle, c.count);
        ranks_[c.rank].grouped.add(c.cycle, c.count, t_.tFAW);
        pim_column_ok_ = std::max(pim_column_ok_, c.cycle + t_.tRCD);
        pim_precharge_ok_ = std::max(pim_precharge_ok_, c.cycle + t_.tRAS);
        break;
      case Op::comp: {
        if (p_.composite || sum_start_ < 0) sum_start_ = c.cycle;
        comp_free_ = c.cycle + c.count * p_.comp_interval;
        report_.comp_cycles += c.count * p_.comp_interval;
        pim_precharge_ok_ = std::max(pim_precharge_ok_, comp_free_ + t_.tRTP);
        sum_ok_ = std::max(comp_free_, sum_start_ + p_.least_comps * p_.comp_interval);
        break;
      }
      case Op::result:
        sum_start_ = -1;
        data_busy(c.cycle + t_.tCL, c.count * t_.burst, -1);
        result_free_ = c.cycle + std::max(t_.tCCD_L, c.count * t_.burst);
        comp_free_ = std::max(comp_free_, sum_ok_ + p_.comp_interval);  // the adders start the next sum
        effect(c.cycle + t_.tCL + c.count * t_.burst, report_.gemv_cycles);
        break;
      case Op::pim_precharge:
        pim_activate_ok_ = c.cycle + t_.tRP;
        for (RowBuffer& b : banks_)
          if (p_.row_buffers == 1) b.activate_ok = std::max(b.activate_ok, pim_activate_ok_);
        effect(pim_activate_ok_, report_.gemv_cycles);
        break;
      default:
        break;
    }
    if (s.gwrite || c.op == Op::pim_precharge) {
      if (!s.gwrite) row_ = (row_ + 1) % m_.rows;
      phase_ = 0;
      ++step_;
    }
  }

  // A processor near the memory
  Candidate next_near() const {
    Candidate best;
    for (size_t i = 0; i < near_open_.size(); ++i) {  // rows read to their end
      const int64_t bundle = near_open_[i].bundle;
      if (near_open_[i].left == 0)
        best =
            candidate(Op::near_precharge, bundle * p_.banks_per_access, near_[bundle].row, near_[bundle].precharge_ok);
      if (best.at < kNever) break;
    }
    if (near_to_open_ > 0 && !draining_ && near_open_.size() < std::min<size_t>(2, bundles_.size())) {
      const int64_t bundle = bundles_[near_visits_ % bundles_.size()];
      if (near_[bundle].row < 0) {
        const int64_t bank = bundle * p_.banks_per_access;
        int64_t at = near_[bundle].activate_ok;
        for (int64_t b = bank; b < bank + p_.banks_per_access; b += m_.banks_per_rank())  // in every rank it spans
          at = std::max(at, activate_at(b, p_.activations_per_access));
        const Candidate c = candidate(Op::near_activate, bank, near_visits_ / int64_t(bundles_.size()) % m_.rows, at,
                                      p_.banks_per_access);
        if (c.at < best.at) best = c;
      }
    }
    for (const NearVisit& v : near_open_) {
      if (v.left == 0) continue;
      const Candidate c = candidate(Op::near_read, v.bundle * p_.banks_per_access, near_[v.bundle].row,
                                    std::max(near_[v.bundle].column_ok, near_column_ + t_.tCCD_L), p_.banks_per_access);
      if (c.at <= best.at) best = c;
      break;
    }
    return best;
  }

  void near_issued(const Command& c) {
    const int64_t bundle = (c.rank * m_.banks_per_rank() + c.bank) / p_.banks_per_access;
    RowBuffer& b = near_[bundle];
    if (c.op == Op::near_activate) {
      const int64_t last = c.cycle + (p_.activations_per_access - 1) / 4 * t_.tFAW;
      for (int64_t i = 0; i < p_.banks_per_access; i += m_.banks_per_rank())
        activated(bundle * p_.banks_per_access + i, c.cycle, p_.activations_per_access);
      b = {c.row, last + t_.tRCD, last + t_.tRAS, last + t_.tRC()};
      const int64_t left = std::min(m_.accesses_per_row(), near_to_open_);
      near_open_.push_back({bundle, left});
      near_to_open_ -= left;
      ++near_visits_;
    } else if (c.op == Op::near_read) {
      near_column_ = c.cycle;
      b.precharge_ok = std::max(b.precharge_ok, c.cycle + t_.tRTP);
      for (NearVisit& v : near_open_)
        if (v.bundle == bundle) --v.left;
      effect(c.cycle + t_.tCL + t_.burst, report_.near_cycles);
    } else {
      b.row = -1;
      b.activate_ok = std::max(b.activate_ok, c.cycle + t_.tRP);
      for (int64_t i = 0; i < p_.banks_per_access; ++i) {
        RowBuffer& bank = banks_[bundle * p_.banks_per_access + i];
        bank.activate_ok = std::max(bank.activate_ok, b.activate_ok);
      }
      for (size_t i = 0; i < near_open_.size(); ++i)
        if (near_open_[i].bundle == bundle) {
          near_open_.erase(near_open_.begin() + static_cast<int64_t>(i));
          break;
        }
    }
  }

  // What a command changes
  void access_issued(const Command& c) {
    const int64_t bank = c.rank * m_.banks_per_rank() + c.bank;
    RowBuffer& b = banks_[bank];
    if (c.op == Op::activate) {
      activated(bank, c.cycle, 1);
      b = {c.row, c.cycle + t_.tRCD, c.cycle + t_.tRAS, c.cycle + t_.tRC()};
      for (Visit& v : window_)
        if (v.bank == bank) v.open = true;
    } else if (c.op == Op::precharge) {
      b.row = -1;
      b.activate_ok = std::max(b.activate_ok, c.cycle + t_.tRP);
      closing_.pop_front();
    } else {
      const bool write = c.op == Op::write;
      const int64_t end = c.cycle + (write ? t_.tCWL : t_.tCL) + t_.burst;
      data_busy(end - t_.burst, t_.burst, c.rank);
      last_column_ = ranks_[c.rank].group_column[group_of(bank)] = c.cycle;
      last_was_write_ = write;
      if (write) {
        write_end_ = end;
        group_write_[bank / m_.banks_per_group] = end;
      }
      b.precharge_ok = std::max(b.precharge_ok, write ? end + t_.tWR : c.cycle + t_.tRTP);
      effect(end, report_.transfer_cycles);
      const auto visit = std::find_if(window_.begin(), window_.end(), [&](const Visit& v) { return v.bank == bank; });
      if (--visit->left == 0) {
        closing_.push_back(bank);
        window_.erase(visit);
      }
    }
  }

  void data_busy(int64_t from, int64_t cycles, int64_t rank) {
    data_free_ = std::max(data_free_, from + cycles);
    data_rank_ = rank;
    report_.data_bus_cycles += cycles;
  }
  void effect(int64_t cycle, int64_t& of_kind) {
    of_kind = std::max(of_kind, cycle);
    report_.cycles = std::max(report_.cycles, cycle);
  }
  void record(const Command& c) {
    now_ = std::max(now_, c.cycle);
    bus_free_[bus_of(c.op)] = c.cycle + 1;
    report_.counts[static_cast<int>(c.op)] += c.op == Op::comp || c.op == Op::result ? c.count : 1;
    if (trace_) trace_->push_back(c);
  }
  void issue(Candidate c) {
    c.command.cycle = c.at;
    record(c.command);
    switch (c.command.op) {
      case Op::activate:
      case Op::precharge:
      case Op::read:
      case Op::write:
        access_issued(c.command);
        break;
      case Op::near_activate:
      case Op::near_read:
      case Op::near_precharge:
        near_issued(c.command);
        break;
      default:
        gemv_issued(c.command);
    }
  }

  // All ranks together, once every row is closed.
  void refresh() {
    int64_t at = std::max(pim_activate_ok_, now_ + 1);
    for (const RowBuffer& b : banks_) at = std::max(at, b.activate_ok);
    for (const RowBuffer& b : near_) at = std::max(at, b.activate_ok);
    for (int64_t r = 0; r < m_.ranks; ++r) {
      Command c;
      c.cycle = std::max(at, bus_free_[0]);
      c.op = Op::refresh;
      c.rank = static_cast<int32_t>(r);
      record(c);
      at = c.cycle;
    }
    const int64_t end = at + t_.tRFC;
    for (RowBuffer& b : banks_) b.activate_ok = std::max(b.activate_ok, end);
    for (RowBuffer& b : near_) b.activate_ok = std::max(b.activate_ok, end);
    pim_activate_ok_ = std::max(pim_activate_ok_, end);
    now_ = std::max(now_, end);
    due_ += t_.tREFI;
    draining_ = false;
  }

  const Memory& m_;
  const Timing& t_;
  const Pim& p_;
  const ChannelWork& work_;
  std::vector<Command>* trace_;
  ChannelReport report_;

  int64_t now_ = 0, due_ = kNever;
  bool draining_ = false;
  int64_t bus_free_[3] = {0, 0, 0};
  std::vector<Rank> ranks_;
  std::vector<RowBuffer> banks_;
  std::vector<int64_t> order_;  // banks as addresses go on

  int64_t data_free_ = 0, data_rank_ = -1, last_column_ = kPast, write_end_ = kPast;
  std::vector<int64_t> group_write_;  // end of the last write to each bank group
  bool last_was_write_ = false;
  std::deque<Visit> window_;
  std::deque<int64_t> closing_;
  size_t transfer_ = 0;
  int64_t transferred_ = 0, visits_ = 0;

  size_t step_ = 0;
  int64_t phase_ = 0, row_ = 0;
  int64_t pim_activate_ok_ = kPast, pim_column_ok_ = kPast, pim_precharge_ok_ = kPast;
  int64_t comp_free_ = kPast, sum_start_ = -1, sum_ok_ = kPast, result_free_ = kPast;

  struct NearVisit {
    int64_t bundle, left;
  };
  std::vector<RowBuffer> near_;
  std::vector<int64_t> bundles_;
  std::vector<NearVisit> near_open_;
  int64_t near_to_open_ = 0, near_visits_ = 0, near_column_ = kPast;
};

}  // namespace

const char* name_of(Op op) {
  static constexpr const char* names[kOps] = {
      "activate",       "precharge", "read",   "write",         "refresh",       "header",    "gwrite",
      "group_activate", "comp",      "result", "pim_precharge", "near_activate", "near_read", "near_precharge"};
  return names[static_cast<int>(op)];
}

ChannelReport simulate_channel(const Device& device, const ChannelWork& work, std::vector<Command>* trace) {
  return Channel(device, work, trace).run();
}

double energy_pj(const Device& device, const ChannelReport& report) {
  const auto count = [&](Op op) { return double(report.counts[static_cast<int>(op)]); };
  const Energy& e = device.energy;
  const double rows = count(Op::activate) + count(Op::gwrite) +
                      count(Op::group_activate) * double(device.pim.banks_per_activation) +
                      count(Op::near_activate) * double(device.pim.banks_per_access);
  return rows * e.activate + count(Op::read) * e.read + count(Op::write) * e.write + count(Op::refresh) * e.refresh +
         count(Op::gwrite) * e.gwrite + count(Op::comp) * e.comp + count(Op::result) * e.result +
         count(Op::near_read) * e.near_read;
}

}  // namespace effops::pim
