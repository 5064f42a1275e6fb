// CUDA's language for a host compiler: what a kernel sees in place of nvcc's own. No __shared__: a block's shared
// memory comes from effops::device::shared_memory(), so that every byte of it is known.
#pragma once

#include "simt/atomics.h"
#include "simt/intrinsics.h"
#include "simt/language.h"
#include "simt/machine.h"
#include "simt/warp.h"
