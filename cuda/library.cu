#include "library.h"

#include "attention/backward.h"
#include "attention/launch.h"
#include "attention/mass.h"
#include "attention/merge_states.h"
#include "cache/cache.h"
#include "gemv/gemv.h"
#include "layer/layer.h"
#include "moe/grouped.h"
#include "moe/moe.h"
#include "pim/pim.h"
#include "sampling/sampling.h"
#include "selection/selection.h"
#include "speculative/speculative.h"
#ifndef __CUDACC__
#include "simt/extents.h"
#endif

namespace effops::device {
namespace {

const char* error_text(int status) {
  if (status == kUnsupported) return "no kernel for this dtype or size";
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(status));
#else
  return effops_simt_report();
#endif
}

DeviceLibrary library() {
  DeviceLibrary l{};
#ifdef __CUDACC__
  l.name = "cuda";
#else
  l.name = "simt";
#endif
  l.error = &error_text;
  l.attention_workspace = &attention_workspace;
  l.attention = &attention;
  l.attention_backward_workspace = &attention_backward_workspace;
  l.attention_backward = &attention_backward;
  l.attention_mass = &attention_mass;
  l.merge_states = &merge_states;
  l.append_rows = &append_rows;
  l.append_evicting = &append_evicting;
  l.kv_merge_workspace = &kv_merge_workspace;
  l.kv_merge = &kv_merge;
  l.commit_rows = &commit_rows;
  l.packed_linear = &packed_linear;
  l.add = &add;
  l.rms_norm = &rms_norm;
  l.rotary = &rotary;
  l.rotary_append = &rotary_append;
  l.silu_mul = &silu_mul;
  l.sampling = &sampling;
  l.pack_ancestors = &pack_ancestors;
  l.verify_greedy = &verify_greedy;
  l.verify_workspace = &verify_workspace;
  l.verify_rejection = &verify_rejection;
  l.verify_typical = &verify_typical;
  l.topk_routing = &topk_routing;
  l.sort_slots_workspace = &sort_slots_workspace;
  l.sort_slots = &sort_slots;
  l.permute_rows = &permute_rows;
  l.unpermute_rows = &unpermute_rows;
  l.grouped_workspace = &grouped_workspace;
  l.grouped = &grouped;
  l.grouped_gradient_workspace = &grouped_gradient_workspace;
  l.grouped_gradient = &grouped_gradient;
  l.label_append = &label_append;
  l.label_search_workspace = &label_search_workspace;
  l.label_search = &label_search;
  l.page_append = &page_append;
  l.page_search_workspace = &page_search_workspace;
  l.page_search = &page_search;
  l.pim_gemv = &pim_gemv;
  return l;
}

}  // namespace
}  // namespace effops::device

extern "C" __attribute__((visibility("default"))) const effops::device::DeviceLibrary* effops_device_library() {
  static const effops::device::DeviceLibrary library = effops::device::library();
  return &library;
}
