// A thread's cp.async copies under way. What a copy carries is read when it is issued and lands when its group is
// waited for; between the two the destination holds poison.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace effops::device::simt {

struct Lane;

class Copies {
 public:
  void reset() {
    copies_.clear();
    landed_ = 0;
    groups_ = 0;
  }
  void issue(Lane& self, void* to, const void* from, int bytes, const void* site);
  void commit() { ++groups_; }
  void wait(Lane& self, int pending, const void* site);
  void check_finished(const Lane& self) const;

 private:
  struct Copy {
    char data[16];
    uint32_t to;  // offset in shared memory
    int group;
    const void* site;
  };
  std::vector<Copy> copies_;
  size_t landed_ = 0;
  int groups_ = 0;  // closed
};

}  // namespace effops::device::simt
