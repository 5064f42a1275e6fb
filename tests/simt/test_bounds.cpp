// Planted accesses outside of what a kernel may touch, and misaligned ones.
#include <memory>

#include "planted.h"
#include "primitives/copy_async.h"
#include "primitives/launch.h"
#include "primitives/ldmatrix.h"
#include "primitives/vector.h"

namespace effops::test {
namespace {

using namespace device;

TEST(global_read_behind_the_end) {
  Global<float> in(100), out(100);
  const Extents extents({{"in", in.get(), 400, false}, {"out", out.get(), 400, true}});
  const float* from = in.get();
  float* to = out.get();
  check_caught({4, 32},
               {"block (3, 0, 0)", "thread 3 ", "global read of 4 bytes out of bounds",
                "offset 400 of 'in', which has 400 bytes", "test_bounds.cpp"},
               [=](bool bug) {
                 return [=] {
                   const int i = blockIdx.x * 32 + threadIdx.x;
                   if (i < 99 || (i == 99 && !bug)) to[i] = from[i];
                   if (bug && i == 99) to[i] = from[i + 1];
                 };
               });
}

TEST(global_write_behind_the_end) {
  Global<float> out(100);
  const Extents extents({{"out", out.get(), 100 * 4, true}});
  float* to = out.get();
  check_caught({4, 32}, {"global write of 4 bytes out of bounds", "offset 400 of 'out'"}, [=](bool bug) {
    return [=] {
      const int i = blockIdx.x * 32 + threadIdx.x;
      if (i < 100 + bug) to[i] = 1;
    };
  });
}

TEST(global_read_before_the_beginning) {
  Global<int> in(10);
  Global<int> out(10);
  const Extents extents({{"in", in.get() + 1, 36, false}, {"out", out.get(), 40, true}});
  const int* from = in.get() + 1;
  int* to = out.get();
  check_caught({1, 1}, {"global read of 4 bytes out of bounds: at offset -4 of 'in'"},
               [=](bool bug) { return [=] { *to = from[bug ? -1 : 0]; }; });
}

TEST(write_of_what_is_read_only) {
  Global<int> in(10);
  int* at = in.get();
  for (bool bug : {true, false}) {
    const Extents extents({{"weights", at, 40, !bug}});
    const std::string text = report_of({1, 10}, [=] { at[threadIdx.x] += 1; });
    CHECK(bug == (text.find("write of 4 bytes at offset 0 of the read-only 'weights' (40 bytes)") != std::string::npos),
          text);
  }
}

TEST(atomic_and_vector_accesses_are_checked) {
  Global<Vector16> in(4);
  const Extents extents({{"in", in.get(), 63, true}});
  Vector16* at = in.get();
  check_caught({1, 1}, {"global read of 16 bytes out of bounds: at offset 48"},
               [=](bool bug) { return [=] { store16(at, load16(at + (bug ? 3 : 2))); }; });
  check_caught({1, 1}, {"global write of 4 bytes out of bounds: at offset 64"},
               [=](bool bug) { return [=] { atomicAdd(reinterpret_cast<unsigned*>(at) + (bug ? 16 : 0), 1u); }; });
}

TEST(cp_async_reads_its_bytes_and_no_more) {
  Global<Vector16> in(1);
  for (int bytes = 0; bytes <= 16; ++bytes) {
    const Extents extents({{"k", in.get(), bytes, false}});
    const Vector16* from = in.get();
    check_caught({1, 1, 16}, {"global read of " + std::to_string(std::min(bytes + 1, 16)) + " bytes out of bounds"},
                 [=](bool bug) {
                   return [=] {
                     copy_async(shared_memory(), bug && bytes == 16 ? from + 1 : from,
                                bug ? std::min(bytes + 1, 16) : bytes);
                     copy_commit();
                     copy_wait<0>();
                   };
                 });
  }
}

struct Params {
  int* out;
  int table[64];
};
constexpr int kTable[] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3};

// By-value parameters, constants of the library and a thread's own arrays need no registration.
__global__ void read_parameters(const __grid_constant__ Params p) {
  int own[16];
  for (int i = 0; i < 16; ++i)
    own[(i * 5 + threadIdx.x) % 16] = p.table[i + threadIdx.x] + kTable[(i + threadIdx.x) % 16];
  p.out[threadIdx.x] = own[threadIdx.x % 16];
}

TEST(parameters_and_constants_are_known) {
  Global<int> out(32);
  const Extents extents({{"out", out.get(), 128, true}});
  CHECK(launch({"read_parameters", 1, 32}, read_parameters, {out.get(), {}}) == 0, simt::last_report());
}

TEST(null_pointer) {
  check_caught({1, 1}, {"global read of 4 bytes at address 0x8"}, [](bool bug) {
    return [=] {
      const int own = 0;
      const volatile int* from = bug ? reinterpret_cast<const int*>(8) : &own;
      use(*from);
    };
  });
}

TEST(shared_access_behind_the_end) {
  check_caught({1, 32, 128}, {"write of 4 bytes out of bounds: at offset 128 of the 128 bytes of shared memory"},
               [](bool bug) { return [=] { reinterpret_cast<float*>(shared_memory())[lane_index() + bug] = 1; }; });
}

TEST(ldmatrix_behind_the_end) {
  check_caught({1, 32, 528}, {"ldmatrix of 16 bytes out of bounds: at offset 528"}, [](bool bug) {
    return [=] {
      for (int i = lane_index(); i < 132; i += 32) reinterpret_cast<float*>(shared_memory())[i] = 1;
      __syncwarp();
      const void* rows[1] = {shared_memory() + 16 * (lane_index() + (bug ? 2 : 1))};
      uint32_t to[1][4];
      ldmatrix_x4(to, rows);
    };
  });
}

TEST(misaligned_accesses) {
  alignas(16) static char memory[64];
  check_caught({1, 1}, {"misaligned access of 16 bytes"},
               [](bool bug) { return [=] { use(load16(memory + (bug ? 8 : 16))); }; });
  check_caught({1, 1, 64}, {"misaligned write of 8 bytes"}, [](bool bug) {
    return [=] { *reinterpret_cast<volatile int64_t*>(shared_memory() + (bug ? 4 : 8)) = 1; };
  });
  check_caught({1, 1, 64}, {"misaligned cp.async"}, [](bool bug) {
    return [=] {
      copy_async(shared_memory(), memory + (bug ? 8 : 0), 16);
      copy_commit();
      copy_wait<0>();
    };
  });
  check_caught({1, 32, 1024}, {"misaligned row of ldmatrix"}, [](bool bug) {
    return [=] {
      for (int i = lane_index(); i < 256; i += 32) reinterpret_cast<float*>(shared_memory())[i] = 1;
      __syncwarp();
      const void* rows[1] = {shared_memory() + 16 * lane_index() + (bug && lane_index() == 9 ? 8 : 0)};
      uint32_t to[1][4];
      ldmatrix_x4(to, rows);
    };
  });
}

}  // namespace
}  // namespace effops::test
