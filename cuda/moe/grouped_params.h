// What a grouped product is started with.
#pragma once

#include "common/device_grouped_plan.h"
#include "primitives/divide.h"

namespace effops::device {

// How two features of w make one of y, in the order of a tile's columns.
enum class Pairing : int8_t {
  none,
  blocks,    // blocks of gate columns and of up columns in turn
  adjacent,  // columns 2j and 2j + 1
};

struct GroupedParams {
  GroupedProblem p;
  FastDivide k;
  int column_tiles = 0;
  Pairing pairing = Pairing::none;
  bool x_pieces = false, w_pieces = false, y_pieces = false;  // rows are fit for 16-byte accesses
};

// kInner: inputs of an output feature are neighbours in w, otherwise outputs of an input feature. U: elements of w.
template <class T, class U, bool kInner>
int launch_grouped(const GroupedParams& a, const GroupedPlan& plan, void* stream);

}  // namespace effops::device
