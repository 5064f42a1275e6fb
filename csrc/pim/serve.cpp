#include "pim/serve.h"

#include <algorithm>
#include <limits>

namespace effops::pim {

Server::Server(System* system, std::vector<Request> requests, const ServeOptions& options)
    : system_(system), requests_(std::move(requests)), options_(options) {
  std::stable_sort(requests_.begin(), requests_.end(),
                   [](const Request& a, const Request& b) { return a.arrival_ns < b.arrival_ns; });
  if (!options_.limit_capacity) {
    room_bytes_ = std::numeric_limits<double>::infinity();
    return;
  }
  room_bytes_ = system_->room_bytes();
  const size_t asked = requests_.size();
  requests_.erase(
      std::remove_if(requests_.begin(), requests_.end(), [&](const Request& q) { return bytes_of(q) > room_bytes_; }),
      requests_.end());
  report_.refused = static_cast<int64_t>(asked - requests_.size());  // they would not fit alone
}

double Server::bytes_of(const Request& q) const { return system_->kv_bytes(q.prompt + q.output); }

// New requests in order of arrival, while there are places and memory for all that they will become.
void Server::join() {
  const auto full = [&] { return static_cast<int64_t>(running_.size()) >= options_.max_batch; };
  if (next_ == requests_.size() || full()) return;
  const size_t before = running_.size();
  std::vector<double> free(system_->split().data, room_bytes_ * double(system_->rooms()));
  for (const Running& r : running_) free[group(r)] -= r.bytes;
  for (; next_ < requests_.size() && !full(); ++next_) {
    const Request& q = requests_[next_];
    if (q.arrival_ns > report_.clock_ns) {
      if (!running_.empty()) break;
      report_.sum.background_pj += (q.arrival_ns - report_.clock_ns) * system_->idle_mw();
      report_.clock_ns = q.arrival_ns;
    }
    const double bytes = bytes_of(q);
    const int64_t part = least_filled(bytes, free);
    if (part < 0) break;
    running_.push_back({q, q.generated, 0, part, report_.clock_ns, bytes});
    free[group(running_.back())] -= bytes;
  }
  // One that no channel has room for waits, and those behind it: these may be why the first has none.
  while (running_.size() > before) {
    const size_t placed = place(before);
    if (placed == running_.size()) break;
    const size_t kept = placed > before ? placed : running_.size() - 1;
    next_ -= running_.size() - kept;
    running_.resize(kept);
  }
}

bool Server::admit(Stage* stage) {
  const size_t before = running_.size();
  join();
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

// The part of the batch with the fewest requests whose devices have room, -1 for none: where one joins, it stays.
int64_t Server::least_filled(double bytes, const std::vector<double>& free) const {
  std::vector<int64_t> size(system_->split().parts());
  for (const Running& r : running_) ++size[r.part];
  int64_t least = -1;
  for (int64_t part = 0; part < system_->split().parts(); ++part)
    if (bytes <= free[part % system_->split().data] && (least < 0 || size[part] < size[least])) least = part;
  return least;
}

// Channels for the requests from `first` on: every part of the batch has devices of its own. The first request that
// no channel has room for; how many there are, where all have one.
size_t Server::place(size_t first) {
  if (!needs_units(system_->scheduler())) return running_.size();
  const int64_t channels = system_->device().memory.channels;
  std::vector<std::vector<double>> free(system_->split().data, std::vector<double>(channels, room_bytes_));
  for (size_t i = 0; i < first; ++i) free[group(running_[i])][running_[i].channel] -= running_[i].bytes;
  int64_t turn = turn_;
  size_t placed = running_.size();
  for (int64_t part = 0; part < system_->split().parts(); ++part) {
    const auto cost = [&](const Running& r) {
      return estimate_attention(system_->device(), system_->shape(), r.request.prompt + r.generated);
    };
    std::vector<int64_t> loads(channels), costs;
    std::vector<size_t> fresh;
    Room room;
    for (size_t i = 0; i < running_.size(); ++i) {
      const Running& r = running_[i];
      if (r.part != part) continue;
      if (i < first) {
        loads[r.channel] += cost(r);
      } else {
        fresh.push_back(i);
        costs.push_back(cost(r));
        room.bytes.push_back(r.bytes);
      }
    }
    const int64_t count = static_cast<int64_t>(fresh.size());
    room.free.swap(free[part % system_->split().data]);
    const auto to =
        options_.balanced ? pack_min_load(costs, &loads, &room) : pack_round_robin(count, channels, turn, &room);
    room.free.swap(free[part % system_->split().data]);
    turn += count;
    for (int64_t i = 0; i < count; ++i) {
      running_[fresh[i]].channel = to[i];
      if (to[i] < 0) placed = std::min(placed, fresh[i]);
    }
  }
  if (placed == running_.size()) turn_ = turn;
  return placed;
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
      if (q.fresh() && q.generated == 0)
        report_.first_token_ns.push_back(report_.clock_ns - std::max(q.request.arrival_ns, 0.0));
      if (++q.generated < q.request.output) {
        running_[kept++] = q;
        continue;
      }
      ++report_.finished;
      if (!q.fresh()) continue;
      report_.end_to_end_ns.push_back(report_.clock_ns - q.request.arrival_ns);
      report_.in_batch_ns.push_back(report_.clock_ns - q.joined_ns);
    }
    running_.resize(kept);
  }
  return !running_.empty() || next_ < requests_.size();
}

}  // namespace effops::pim
