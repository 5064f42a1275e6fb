// The schemas of all ops. Meanings: docs/api; fakes and autograd: python/effops/ops/_registration.py.
#include "ops/tensor.h"

#define EFFOPS_MASKS                                                                                        \
  "bool causal=False, int window=0, int num_sinks=0, Tensor? prefix_lens=None, Tensor? head_windows=None, " \
  "Tensor? sink_logits=None, float softcap=0.0, float? scale=None"
#define EFFOPS_FILTERS "float temperature=1.0, int top_k=0, float top_p=1.0, float min_p=0.0"

STABLE_TORCH_LIBRARY(effops, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, *, Tensor? kv_lens=None, Tensor? kv_starts=None, " EFFOPS_MASKS
        ", int? max_kv_len=None) -> (Tensor, Tensor)");
  m.def(
      "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, "
      "Tensor? kv_starts=None, " EFFOPS_MASKS ", int? max_q_len=None, int? max_kv_len=None) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, *, "
      "Tensor? kv_lens=None, Tensor? kv_starts=None, " EFFOPS_MASKS ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "varlen_attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, Tensor? kv_starts=None, " EFFOPS_MASKS
      ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("merge_states(Tensor outs, Tensor lses) -> (Tensor, Tensor)");
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor kv_lens, *, "
      "Tensor? cu_seqlens_q=None, Tensor? kv_starts=None, " EFFOPS_MASKS
      ", int? max_q_len=None, int? max_kv_len=None) -> (Tensor, Tensor)");
  m.def(
      "tree_attention(Tensor q, Tensor k, Tensor v, Tensor ancestors, *, Tensor? depths=None, Tensor? kv_lens=None, "
      "Tensor? page_table=None, Tensor? cu_seqlens_q=None, Tensor? kv_starts=None, int window=0, int num_sinks=0, "
      "Tensor? head_windows=None, Tensor? sink_logits=None, float softcap=0.0, float? scale=None, "
      "int? max_q_len=None, int? max_kv_len=None) -> (Tensor, Tensor)");
  m.def(
      "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, *, Tensor? kv_lens=None, "
      "Tensor? page_table=None, Tensor? kv_starts=None, Tensor? sink_logits=None, float softcap=0.0, "
      "float? scale=None) -> (Tensor, Tensor)");
  m.def(
      "cascade_attention(Tensor q, Tensor[] k, Tensor[] v, Tensor[] lens, Tensor[] group_indptr, "
      "Tensor[] page_tables, *, bool causal=False, Tensor? ancestors=None, Tensor? depths=None, "
      "Tensor? sink_logits=None, float softcap=0.0, float? scale=None) -> (Tensor, Tensor)");
  m.def(
      "accumulate_mass(Tensor(a!) mass, Tensor q, Tensor k, Tensor lse, *, Tensor? kv_lens=None, "
      "Tensor? kv_starts=None, bool causal=False, int window=0, int num_sinks=0, float softcap=0.0, "
      "float? scale=None, Tensor? page_table=None) -> ()");
  m.def(
      "append_evicting(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor(c!) mass, "
      "Tensor(d!) positions, Tensor new_positions, *, int recent, int num_sinks=0) -> ()");
  m.def(
      "merge_kv(Tensor(a!) k, Tensor(b!) v, Tensor kept, *, Tensor? kv_lens=None, str merging='pivotal', "
      "float? least_similarity=None) -> (Tensor, Tensor)");
  m.def(
      "append_labels(Tensor(a!) labels, Tensor k, Tensor slots, Tensor channels, *, Tensor? scales=None, "
      "Tensor? offsets=None, int bits=0) -> ()");
  m.def(
      "label_topk(Tensor q, Tensor labels, Tensor channels, int k, *, Tensor? scales=None, Tensor? kv_lens=None, "
      "Tensor? kv_starts=None, int num_sinks=0, int window=0, bool each_head=False, int bits=0) -> Tensor");
  m.def("append_page_bounds(Tensor(a!) low, Tensor(b!) high, Tensor k, Tensor slots, int page) -> ()");
  m.def(
      "page_topk(Tensor q, Tensor low, Tensor high, int pages, int page, *, Tensor? kv_lens=None, int num_sinks=0, "
      "int window=0, bool each_head=False) -> Tensor");
  m.def(
      "pim_gemv(Tensor x, Tensor banks, int out_features, int sum_values, int lanes, *, Tensor? rows=None, "
      "Tensor? columns=None, int channels=1, bool narrow_results=True) -> Tensor");
  m.def(
      "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slots, *, "
      "Tensor? page_table=None) -> ()");
  m.def(
      "commit_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor nodes, Tensor starts, *, "
      "Tensor? page_table=None) -> ()");
  m.def(
      "packed_linear(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? residual=None, Tensor? norm=None, "
      "float norm_eps=1e-6, bool gated=False, bool int8_activation=False, bool batch_invariant=False) -> Tensor");
  m.def(
      "decoder_layer(Tensor x, Tensor attention_norm, Tensor qkv, Tensor? qkv_bias, Tensor o, Tensor? o_bias, "
      "Tensor mlp_norm, Tensor gate_up, Tensor? gate_up_bias, Tensor down, Tensor? down_bias, Tensor cos, Tensor sin, "
      "Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor kv_lens, float norm_eps=1e-6, "
      "int window=0, int? max_kv_len=None, Tensor? page_table=None, Tensor? ancestors=None, "
      "Tensor? depths=None, bool batch_invariant=False) -> Tensor");
  m.def(
      "decoder(Tensor tokens, Tensor embedding, Tensor[] attention_norm, Tensor[] qkv, Tensor[] qkv_bias, Tensor[] o, "
      "Tensor[] o_bias, Tensor[] mlp_norm, Tensor[] gate_up, Tensor[] gate_up_bias, Tensor[] down, "
      "Tensor[] down_bias, Tensor norm, Tensor lm_head, Tensor cos, Tensor sin, Tensor positions, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor kv_lens, int[] windows, float norm_eps=1e-6, "
      "int? max_kv_len=None, Tensor? page_table=None, Tensor? ancestors=None, Tensor? depths=None, "
      "bool batch_invariant=False) -> (Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps=1e-6, *, float weight_offset=0.0) -> Tensor");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, Tensor positions) -> Tensor");
  m.def(
      "rotary_append(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slots, *, Tensor? page_table=None) -> Tensor");
  m.def("silu_mul(Tensor x) -> Tensor");
  m.def("sample(Tensor logits, Tensor? uniforms=None, *, " EFFOPS_FILTERS ") -> Tensor");
  m.def("sampling_probs(Tensor logits, *, " EFFOPS_FILTERS ") -> Tensor");
  m.def(
      "medusa_draft(Tensor hidden, Tensor root, Tensor depths, Tensor ranks, Tensor weight, Tensor bias, "
      "Tensor? projections, Tensor? roots, Tensor? embedding, Tensor lm_head, Tensor? vocabulary=None) -> Tensor");
  m.def("pack_ancestors(Tensor parents) -> (Tensor, Tensor)");
  m.def("verify_greedy(Tensor parents, Tensor draft_tokens, Tensor target_tokens) -> (Tensor, Tensor, Tensor)");
  m.def(
      "verify_rejection(Tensor parents, Tensor draft_tokens, Tensor? draft_probs, Tensor target_probs, "
      "Tensor uniforms, *, str siblings) -> (Tensor, Tensor, Tensor)");
  m.def(
      "verify_typical(Tensor parents, Tensor draft_tokens, Tensor target_probs, *, float epsilon=0.09, "
      "float delta=0.3, Tensor? uniforms=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "topk_routing(Tensor logits, int k, *, str scoring='softmax', bool renormalize=True, float scale=1.0, "
      "Tensor? bias=None, int groups=1, int topk_group=1, str group_score='max') -> (Tensor, Tensor)");
  m.def("moe_sort(Tensor ids, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def("moe_permute(Tensor x, Tensor ids, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def("moe_unpermute(Tensor y, Tensor? weights, Tensor inverse) -> Tensor");
  m.def(
      "grouped_mm(Tensor x, Tensor w, Tensor offsets, *, Tensor? bias=None, Tensor? in_sizes=None, "
      "Tensor? out_sizes=None, bool batch_invariant=False) -> Tensor");
  m.def(
      "grouped_mm_weight_gradient(Tensor x, Tensor dy, Tensor offsets, *, Tensor? in_sizes=None, "
      "Tensor? out_sizes=None) -> Tensor");
  m.def(
      "fused_experts(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor ids, *, str activation='silu', "
      "bool gated=True, bool interleaved=False, Tensor? bias_gate_up=None, Tensor? bias_down=None, "
      "Tensor? scale_gate_up=None, Tensor? scale_down=None, int packed_features=0, "
      "bool batch_invariant=False) -> Tensor");
}
