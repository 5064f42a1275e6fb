// What a device is made of, in plain numbers. Python reads them from a data file with a source for each and has
// checked them; everything here is in memory clock cycles, bytes, picojoules or as its name says.
#pragma once

#include <cstdint>

namespace effops::pim {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Timing {
  int64_t tRCD = 0, tRP = 0, tRAS = 0, tCL = 0, tCWL = 0;
  int64_t burst = 0;  // cycles the data bus is busy with one access
  int64_t tCCD_S = 0, tCCD_L = 0, tRRD_S = 0, tRRD_L = 0, tFAW = 0;
  int64_t tWR = 0, tWTR_S = 0, tWTR_L = 0, tRTP = 0, tRTRS = 0;
  int64_t tREFI = 0, tRFC = 0;

  int64_t tRC() const { return tRAS + tRP; }
};

struct Memory {
  double clock_ghz = 0;
  int64_t channels = 0, ranks = 0, bank_groups = 0, banks_per_group = 0, rows = 0;
  int64_t row_bytes = 0;      // of one bank
  int64_t access_bytes = 0;   // of one read or write
  int64_t command_buses = 1;  // 2: rows and columns have a bus each
  double flat_gb_per_s = 0;   // where it is set, the rate is this one and commands are not simulated
  double flat_gb = 0;         // its capacity

  int64_t banks_per_rank() const { return bank_groups * banks_per_group; }
  int64_t banks() const { return ranks * banks_per_rank(); }
  int64_t accesses_per_row() const { return row_bytes / access_bytes; }
  int64_t channel_bytes() const { return banks() * rows * row_bytes; }
};

// none: ordinary memory. banks: a multiplier row at every bank and one vector for the channel (Newton, NeuPIMs).
// near: a processor that reads several banks at once over paths of its own (Logic-PIM, Bank-PIM).
enum class PimKind : uint8_t { none, banks, near };

struct Pim {
  PimKind kind = PimKind::none;
  // banks
  int64_t row_buffers = 1;           // 2: reads and writes go on while the units compute
  int64_t comp_bytes = 0;            // of a bank's row that one product command covers
  int64_t comp_interval = 0;         // cycles between product commands: the data path, or the power window
  int64_t least_comps = 0;           // products after which a result can be read at the earliest
  int64_t banks_per_activation = 0;  // opened by one grouped activation
  int64_t gwrite_cycles = 0;         // copies a row into the channel's vector buffer
  int64_t result_bytes = 0;          // that a bank returns for one sum
  bool composite = false;            // one command starts the products of a sum, and a header announces them
  bool window_shared = true;         // ordinary activations count in the power window of grouped ones
  // near
  int64_t banks_per_access = 0;
  int64_t activations_per_access = 0;  // that opening those banks counts in the power window tFAW
  double peak_tflops = 0;              // of the whole device
};

enum class ProcessorKind : uint8_t { systolic, roofline };

struct Processor {
  ProcessorKind kind = ProcessorKind::roofline;
  // systolic: weight-stationary arrays and vector units
  double clock_ghz = 0;
  int64_t arrays = 0, array_rows = 0, array_columns = 0, vector_units = 0, vector_width = 0;
  // roofline
  double peak_tflops = 0;
  double launch_us = 0;             // of one kernel
  int64_t kernels_per_request = 0;  // of attention; 0: one kernel for the batch
};

struct Link {
  double gb_per_s = 0, latency_us = 0;            // between the devices of a node, each way
  double node_gb_per_s = 0, node_latency_us = 0;  // between nodes
};

// Picojoules of one event, milliwatts that a channel draws all the time.
struct Energy {
  double activate = 0;                      // opening and closing one bank's row
  double read = 0, write = 0;               // one access over the external path
  double refresh = 0;                       // one refresh of a rank
  double gwrite = 0, comp = 0, result = 0;  // one command, all its banks together
  double near_read = 0;                     // one access of all its banks over the near path
  double background_mw = 0, extra_row_buffer_mw = 0;
  double flop = 0;  // of the processor or of the near one
  double link_byte = 0;
};

struct Device {
  Memory memory;
  Timing timing;
  Pim pim;
  Processor processor;
  Link link;
  Energy energy;

  // Of a channel's banks, those that a near processor reads at once make a bundle.
  int64_t bundles() const { return pim.kind == PimKind::near ? memory.banks() / pim.banks_per_access : 0; }
  double refresh_mw() const {  // of a channel, pJ a ns
    return timing.tREFI > 0 ? double(memory.ranks) * energy.refresh * memory.clock_ghz / double(timing.tREFI) : 0;
  }
  double capacity() const {
    return memory.flat_gb_per_s > 0 ? memory.flat_gb * 1e9 : double(memory.channels) * double(memory.channel_bytes());
  }
};

}  // namespace effops::pim
