// A small test harness: TEST registers a test, CHECK ends it with the place and what was seen.
#pragma once

#include <cmath>
#include <exception>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace effops::test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

#define TEST(name)                                                                            \
  static void test_##name();                                                                  \
  static const bool registered_##name = (all_tests().push_back({#name, &test_##name}), true); \
  static void test_##name()

template <class... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream message;
  message << file << ":" << line << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define CHECK(condition, ...) \
  if (!(condition)) ::effops::test::fail(__FILE__, __LINE__, #condition, ": ", __VA_ARGS__)

// Equal infinities are near; a NaN is near nothing.
inline bool near(double got, double want, double tolerance) { return got == want || std::abs(got - want) <= tolerance; }

// Runs every test and returns the exit code.
inline int run_all_tests() {
  int failed = 0;
  for (const Test& test : all_tests()) {
    try {
      test.run();
      std::cout << "ok      " << test.name << std::endl;
    } catch (const std::exception& e) {
      ++failed;
      std::cout << "FAILED  " << test.name << "\n        " << e.what() << std::endl;
    }
  }
  std::cout << all_tests().size() - failed << " of " << all_tests().size() << " tests passed" << std::endl;
  return failed == 0 && !all_tests().empty() ? 0 : 1;
}

}  // namespace effops::test
