// Conflicts of shared memory's 32 banks of 4 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace effops::device::simt {

// How many passes more than one `count` lanes need that access `bytes` each at these offsets, if they do it together.
// The same word serves any number of lanes.
int extra_passes(const int64_t* offsets, int count, int bytes);

// Plain accesses of the lanes of a warp happen one after the other on the host. Those of one place in the code between
// two meetings of the warp count as made together, the first of every lane, the second of every lane, and so on.
class WarpAccesses {
 public:
  void add(int lane, const void* site, int64_t offset, int bytes);
  // The conflicts of all since the last call.
  int64_t take();

 private:
  struct Access {
    uint32_t lanes = 0;
    int64_t offsets[32];
  };
  struct Site {
    const void* code;
    int bytes;
    std::vector<Access> accesses;
    size_t count[32] = {};  // of each lane
  };
  Site& site_of(const void* code, int bytes);

  std::vector<Site> sites_;
  size_t last_ = 0;
};

}  // namespace effops::device::simt
