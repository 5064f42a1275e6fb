#include "simt/banks.h"

#include <algorithm>

namespace effops::device::simt {
namespace {

constexpr int kBanks = 32, kWord = 4, kBankBytes = kBanks * kWord;

// What the hardware serves at a time: 128 bytes.
int lanes_together(int bytes) { return bytes <= kWord ? 32 : kBankBytes / bytes; }

int64_t conflicts(const int64_t (&offsets)[32], uint32_t lanes, int bytes) {
  int64_t sum = 0;
  const int together = lanes_together(bytes);
  for (int first = 0; first < 32; first += together) {
    int64_t present[32];
    int count = 0;
    for (int i = first; i < first + together; ++i)
      if (lanes >> i & 1) present[count++] = offsets[i];
    sum += extra_passes(present, count, bytes);
  }
  return sum;
}

}  // namespace

int extra_passes(const int64_t* offsets, int count, int bytes) {
  int passes[kBanks] = {}, most = 1;
  int64_t words[kBanks][32];
  for (int i = 0; i < count; ++i)
    for (int64_t word = offsets[i] / kWord; word <= (offsets[i] + bytes - 1) / kWord; ++word) {
      const int bank = static_cast<int>(word % kBanks);
      int64_t* end = words[bank] + passes[bank];
      if (std::find(words[bank], end, word) != end) continue;
      *end = word;
      most = std::max(most, ++passes[bank]);
    }
  return most - 1;
}

WarpAccesses::Site& WarpAccesses::site_of(const void* code, int bytes) {
  for (size_t i = 0; i < sites_.size(); ++i, ++last_) {
    if (last_ >= sites_.size()) last_ = 0;
    if (sites_[last_].code == code && sites_[last_].bytes == bytes) return sites_[last_];
  }
  last_ = sites_.size();
  return sites_.emplace_back(Site{code, bytes, {}, {}});
}

void WarpAccesses::add(int lane, const void* code, int64_t offset, int bytes) {
  Site& site = site_of(code, bytes);
  const size_t at = site.count[lane]++;
  if (at == site.accesses.size()) site.accesses.emplace_back();
  site.accesses[at].lanes |= 1u << lane;
  site.accesses[at].offsets[lane] = offset;
}

int64_t WarpAccesses::take() {
  int64_t sum = 0;
  for (const Site& s : sites_)
    for (const Access& a : s.accesses) sum += conflicts(a.offsets, a.lanes, s.bytes);
  sites_.clear();
  last_ = 0;
  return sum;
}

}  // namespace effops::device::simt
