// One memory channel, command by command. Three agents ask for commands: ordinary reads and writes, the units at the
// banks, a processor near the memory. The controller issues whichever may go first, the units' before the others'.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "pim/device.h"

namespace effops::pim {

enum class Op : uint8_t {
  activate,
  precharge,
  read,
  write,
  refresh,  // a bank's row buffer; refresh takes a rank
  header,
  gwrite,
  group_activate,
  comp,
  result,
  pim_precharge,  // units at the banks, all banks at once
  near_activate,
  near_read,
  near_precharge,  // several banks over the near path
};
constexpr int kOps = 14;

const char* name_of(Op op);

struct Command {
  int64_t cycle = 0;
  Op op = Op::activate;
  int32_t rank = 0;
  int32_t bank = 0;  // in its rank; the first of several
  int64_t row = 0;
  int64_t count = 1;  // products that a composite command starts, bursts of a result
};

// Accesses in the order of addresses: along a row, then bank after bank, rank after rank.
struct Transfer {
  int64_t accesses = 0;
  bool write = false;
};

// One step of the units: a vector into the buffer, or one row of every bank times it.
struct GemvStep {
  bool gwrite = false;
  int64_t sums = 0;           // results of each bank
  int64_t comps_per_sum = 0;  // products of each
};

struct ChannelWork {
  std::vector<Transfer> transfers;
  std::vector<GemvStep> gemv;
  int64_t near_accesses = 0;
  bool refresh = true;
};

struct ChannelReport {
  int64_t cycles = 0;                                             // until the last command has taken effect
  int64_t transfer_cycles = 0, gemv_cycles = 0, near_cycles = 0;  // until the last of each kind has
  int64_t data_bus_cycles = 0;                                    // busy
  int64_t comp_cycles = 0;                                        // of the units
  std::array<int64_t, kOps> counts{};
};

// Deterministic. Writes every command to *trace when given.
ChannelReport simulate_channel(const Device& device, const ChannelWork& work, std::vector<Command>* trace = nullptr);

double energy_pj(const Device& device, const ChannelReport& report);

}  // namespace effops::pim
