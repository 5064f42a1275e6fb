// Kernels with a planted bug have to be caught, in every order that lanes and blocks run in; their corrected twins not.
#pragma once

#include "run.h"
#include "simt/extents.h"

namespace effops::test {

// Keeps the compiler from dropping a value that was read.
template <class T>
void use(T x) {
  asm volatile("" : "+m"(x));
}

template <class Work>
void in_several_orders(Work&& work) {
  for (const char* seed : {"", "1", "2", "3", "4"}) {
    setenv("EFFOPS_SIMT_SEED", seed, 1);
    work(seed);
  }
  setenv("EFFOPS_SIMT_SEED", "", 1);
}

// A report with these words, and nothing wrong when the bug is taken out: `make(bug)` returns the kernel.
template <class Make>
void check_caught(Shape shape, const std::vector<std::string>& words, Make&& make) {
  in_several_orders([&](const char* seed) {
    const std::string text = report_of(shape, make(true));
    for (const std::string& word : words)
      CHECK(text.find(word) != std::string::npos, "seed '", seed, "': no '", word, "' in: ", text);
    CHECK(text.find("kernel tested, block (") != std::string::npos, text);
    const std::string corrected = report_of(shape, make(false));
    CHECK(corrected.empty(), "seed '", seed, "', the corrected kernel: ", corrected);
  });
}

// Of the calling thread's launches while it lives.
class Extents {
 public:
  explicit Extents(std::vector<simt::Extent> list) { effops_simt_extents(list.data(), int64_t(list.size())); }
  ~Extents() { effops_simt_extents(nullptr, 0); }
  Extents(const Extents&) = delete;
  Extents& operator=(const Extents&) = delete;
};

}  // namespace effops::test
