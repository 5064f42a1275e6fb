// A decoder in the numbers that decide its time: what a Hugging Face config.json says.
#pragma once

#include <cstdint>

namespace effops::pim {

struct Model {
  int64_t layers = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0, vocab = 0;
  int64_t ffn_matrices = 3;  // 3: gate, up, down; 2: up, down
  int64_t experts = 0, top_k = 0;
  int64_t expert_period = 1;  // one layer of so many has experts
  int64_t value_bytes = 2;

  int64_t group() const { return heads / kv_heads; }
  int64_t expert_layers() const { return experts > 0 ? layers / expert_period : 0; }
  double ffn_bytes() const { return double(ffn_matrices * hidden * intermediate * value_bytes); }
  double expert_bytes() const { return double(expert_layers() * experts) * ffn_bytes(); }
  double other_bytes() const {
    const double attention = double((2 * heads + 2 * kv_heads) * head_dim * hidden * value_bytes);
    return double(layers) * attention + double(layers - expert_layers()) * ffn_bytes() +
           2.0 * double(vocab * hidden * value_bytes);
  }
};

// How a model lies on the devices: its layers split over `tensor` devices of a node, consecutive layers over
// `pipeline` groups of them, requests over `data` groups.
struct Split {
  int64_t tensor = 1, pipeline = 1, data = 1;
  bool split_experts = false;  // every expert over a node's devices, instead of experts over devices

  int64_t devices() const { return tensor * pipeline * data; }
  int64_t parts() const { return pipeline * data; }  // of a batch; part i is group i % data's, i / data in its pipeline
};

}  // namespace effops::pim
