// What the ops over groups of rows share.
#pragma once

#include "ops/backend.h"

namespace effops::ops {

using OptionalTensor = std::optional<Tensor>;

// The end of each group's rows, int32 [E]: none decreases, none exceeds `rows`, where they are checked.
const int32_t* group_ends(const Arg& offsets, Tensor& t, const Arg& like, int64_t groups, int64_t rows);

// Sets layout and strides of w [groups, in, out] or, `out_first`, [groups, out, in]; w becomes a copy where neither
// inputs nor outputs lie side by side.
void take_weight(GroupedProblem& p, Arg w, Tensor& t, bool out_first);

// The rows of a matrix, a copy where the elements of a row do not lie side by side.
Arg rows_in_line(Arg a, Tensor& t);

// Runs the product on the device of the backend.
void launch_grouped(const Backend& backend, const GroupedProblem& p, const Arg& like);

}  // namespace effops::ops
