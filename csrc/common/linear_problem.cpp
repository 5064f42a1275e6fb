#include "common/linear_problem.h"

#include <sstream>

namespace effops {

std::string explain_linear(const LinearProblem& p, const char* isa) {
  const bool streams = streams_linear(p.dtype, p.rows, false);
  std::ostringstream o;
  o << "backend: " << (streams ? "cpu" : "torch") << "\n";
  if (streams) {
    o << "isa: " << (p.dtype == DType::f64 ? "float64 vectors of " : "") << isa << "\n"
      << "loop: streaming\n"
      << "tasks: " << (p.out + kLinearPiece - 1) / kLinearPiece << "\n"
      << "threads_used: " << (linear_worth_threads(p) ? "yes" : "no, too little work") << "\n";
  } else {
    o << "loop: torch gemm (aten::linear), more than " << kLinearRows << " rows\n";
  }
  o << "rows: " << p.rows << "\n"
    << "weight_bytes: " << p.in * p.out * int64_t(size_of(p.dtype)) << "\n"
    << "flops: " << 2 * p.rows * p.in * p.out << "\n";
  return o.str();
}

}  // namespace effops
