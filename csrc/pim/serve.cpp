#include "pim/serve.h"

#include <algorithm>

namespace effops::pim {

Server::Server(System* system, std::vector<Request> requests, const ServeOptions& options)
    : system_(system), requests_(std::move(requests)), options_(options) {
  std::stable_sort(requests_.begin(), requests_.end(),
                   [](const Request& a, const Request& b) { return a.arrival_ns < b.arrival_ns; });
  const Model& m = system_->model();
  room_bytes_ = system_->device().capacity() * double(system_->split().devices()) -
                m.other_bytes() * double(system_->split().data) - m.expert_bytes();
}

// New requests, while there are places and memory for all that they will become.
bool Server::admit(Stage* stage) {
  const double per_token = system_->model().kv_bytes_per_token();
  const size_t before = running_.size();
  while (next_ < requests_.size() && static_cast<int64_t>(running_.size()) < options_.max_batch) {
    const Request& q = requests_[next_];
    if (q.arrival_ns > report_.clock_ns) {
      if (!running_.empty()) break;
      report_.sum.background_pj += (q.arrival_ns - report_.clock_ns) * system_->idle_mw();
      report_.clock_ns = q.arrival_ns;
    }
    const double bytes = per_token * double(q.prompt + q.output);
    if (options_.limit_capacity && bytes > room_bytes_) {
      if (!running_.empty()) break;
      ++report_.refused;  // it would not fit alone
      ++next_;
      continue;
    }
    room_bytes_ -= bytes;
    running_.push_back({q, q.generated, 0, least_filled()});
    ++next_;
  }
  place(before);
  for (size_t i = 0; i < running_.size(); ++i) {
    Running& r = running_[i];
    if (i >= before && options_.prefill && r.generated == 0) {
      stage->prefill.push_back(r.request.prompt);
      stage->prefill_part.push_back(r.part);
    } else {
      stage->decode.push_back(r.request.prompt + std::max<int64_t>(1, r.generated));
      stage->channel.push_back(r.channel);
      stage->decode_part.push_back(r.part);
    }
  }
  return !running_.empty();
}

// The part of the batch with the fewest requests: where one joins, it stays.
int64_t Server::least_filled() const {
  std::vector<int64_t> size(system_->split().parts());
  for (const Running& r : running_) ++size[r.part];
  return std::min_element(size.begin(), size.end()) - size.begin();
}

// Channels for the requests from `first` on: every part of the batch has devices of its own.
void Server::place(size_t first) {
  if (!needs_units(system_->scheduler()) || first == running_.size()) return;
  const int64_t channels = system_->device().memory.channels;
  for (int64_t part = 0; part < system_->split().parts(); ++part) {
    const auto cost = [&](const Running& r) {
      return estimate_attention(system_->device(), system_->shape(), r.request.prompt + r.generated, {});
    };
    std::vector<int64_t> loads(channels), costs;
    std::vector<size_t> fresh;
    for (size_t i = 0; i < running_.size(); ++i) {
      if (running_[i].part != part) continue;
      if (i < first) {
        loads[running_[i].channel] += cost(running_[i]);
      } else {
        fresh.push_back(i);
        costs.push_back(cost(running_[i]));
      }
    }
    const int64_t count = static_cast<int64_t>(fresh.size());
    const auto to = options_.balanced ? pack_min_load(costs, &loads) : pack_round_robin(count, channels, turn_);
    turn_ += count;
    for (int64_t i = 0; i < count; ++i) running_[fresh[i]].channel = to[i];
  }
}

bool Server::advance(int64_t stages) {
  for (; stages > 0; --stages) {
    Stage stage;
    if (!admit(&stage)) return next_ < requests_.size();
    const StageReport r = system_->step(stage, options_.seed + static_cast<uint64_t>(report_.stages));
    report_.sum += r;
    report_.clock_ns += r.ns;
    report_.batch_ns += r.ns * double(running_.size());
    ++report_.stages;
    if (!stage.prefill.empty()) ++report_.mixed_stages;
    if (!stage.decode.empty()) {
      report_.gap_ns.push_back(r.ns);
      report_.gap_count.push_back(static_cast<int64_t>(stage.decode.size()));
    }
    report_.tokens += static_cast<int64_t>(running_.size());
    size_t kept = 0;
    for (Running& q : running_) {
      if (q.generated == q.request.generated)
        report_.first_token_ns.push_back(report_.clock_ns - std::max(q.request.arrival_ns, 0.0));
      if (++q.generated < q.request.output) {
        running_[kept++] = q;
        continue;
      }
      ++report_.finished;
      report_.end_to_end_ns.push_back(report_.clock_ns - q.request.arrival_ns);
      room_bytes_ += system_->model().kv_bytes_per_token() * double(q.request.prompt + q.request.output);
    }
    running_.resize(kept);
  }
  return !running_.empty() || next_ < requests_.size();
}

}  // namespace effops::pim
