// Products of sorted rows: a fixed number of blocks walk the tiles of all groups, each step of depth some stages behind
// its copy. The stream of copies does not stop at a tile's end.
#pragma once

#include "moe/grouped_load.h"
#include "moe/grouped_mma.h"
#include "moe/grouped_output.h"
#include "moe/grouped_scalar.h"

namespace effops::device {

template <class Shape>
struct GroupedTiles {
  using Product = std::conditional_t<Shape::kScalar, ScalarProduct<Shape>, MmaProduct<Shape>>;
  using Output = GroupedOutput<Shape, Product>;
  static constexpr int kStages = Shape::kStages, kSharedBytes = Shape::kPipelineBytes + Output::kBytes;
  static constexpr int kBlocks = Shape::kTile.blocks, kSMBytes = 228 * 1024, kReserved = 1024;  // on sm_90
  static_assert(kBlocks * (kSharedBytes + kReserved) <= kSMBytes, "registers are kept for blocks that do not fit");

  __device__ static void run(const GroupedParams& a, char* shared) {
    GroupedLoad<Shape> load(a, shared);
    GroupedWalk<Shape::kRows, Shape::kColumns> walk(a);
    const Output output(a, shared + Shape::kPipelineBytes);
    for (int stage = 0; stage < kStages - 1; ++stage) {
      load.load(stage);
      copy_commit();
    }
    GroupTile tile;
    int stage = 0, step = 0;
    while (walk.next(tile)) {
      Product product;
      product.clear();
      for (int done = 0; done < tile.depth; done += Shape::kDepth, ++step) {
        copy_wait<kStages - 2>();
        char* weights = Shape::raw(shared, stage);
        if constexpr (Shape::kBytes) {
          load.convert(Shape::converted(shared, step), weights, a.pairing);
          weights = Shape::converted(shared, step);
        }
        __syncthreads();  // the step is there, and the one before has been read
        load.load(stage == 0 ? kStages - 1 : stage - 1);
        copy_commit();
        product.add(Shape::rows(shared, stage), weights, tile.rows);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      output.write(tile, product);
    }
    copy_wait<0>();
    output.clear(walk.end());
  }
};

template <class Shape>
__global__ void __launch_bounds__(kGroupedThreads, GroupedTiles<Shape>::kBlocks)
    grouped_tiles(const __grid_constant__ GroupedParams a) {
  GroupedTiles<Shape>::run(a, shared_memory());
}

}  // namespace effops::device
