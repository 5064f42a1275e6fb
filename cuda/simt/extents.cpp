#include "simt/extents.h"

#include "simt/grid.h"

namespace effops::device::simt {

ExtentList& registered_extents() {
  static thread_local ExtentList list;
  return list;
}

}  // namespace effops::device::simt

void effops_simt_extents(const effops::device::simt::Extent* e, int64_t count) {
  auto& list = effops::device::simt::registered_extents();
  list.all.clear();
  list.writable_bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(e[i].data);
    list.all.push_back({e[i].name ? e[i].name : "?", begin, begin + e[i].bytes, e[i].writable, list.writable_bytes});
    if (e[i].writable) list.writable_bytes += e[i].bytes;
  }
}

int64_t effops_simt_bank_conflicts() { return effops::device::simt::last_bank_conflicts(); }

const char* effops_simt_report() { return effops::device::simt::last_report(); }
