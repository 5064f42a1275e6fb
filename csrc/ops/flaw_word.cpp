#include "ops/flaw_word.h"

#include <torch/csrc/stable/ops.h>

namespace effops::ops {

FlawWord::FlawWord(const Backend& backend, const Arg& like) {
  if (!backend.checks_values()) return;
  memory_ = empty({1}, type_int64(), like);
  torch::stable::fill_(*memory_, device::kNoFlaw);
  data_ = reinterpret_cast<int64_t*>(Arg(like.op, "flaw", *memory_).mutable_data());
}

std::optional<int64_t> FlawWord::read() const {
  if (!memory_) return std::nullopt;
  const int64_t flaw = Readable<int64_t>(Arg("", "flaw", *memory_)).at(0);
  return flaw == device::kNoFlaw ? std::nullopt : std::optional(flaw);
}

}  // namespace effops::ops
