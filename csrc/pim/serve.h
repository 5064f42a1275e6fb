// Continuous batching: at every stage requests that have come join while there is room, are prefilled, and then decode
// a token a stage until they are done.
#pragma once

#include <cstdint>
#include <vector>

#include "pim/system.h"

namespace effops::pim {

struct Request {
  double arrival_ns = 0;
  int64_t prompt = 0, output = 0;
  int64_t generated = 0;  // tokens that it has already when it joins: a batch in full swing
};

struct ServeOptions {
  int64_t max_batch = 1;
  bool prefill = true;         // false: prompts are prefilled elsewhere
  bool balanced = true;        // requests to channels by least load; else by turns
  bool limit_capacity = true;  // requests wait for memory
  uint64_t seed = 0;
};

struct ServeReport {
  StageReport sum;
  double clock_ns = 0;
  int64_t stages = 0, mixed_stages = 0, tokens = 0, finished = 0, refused = 0;
  double batch_ns = 0;             // running requests times time
  std::vector<double> gap_ns;      // of each stage, between a sequence's tokens
  std::vector<int64_t> gap_count;  // sequences that saw it
  // Of each request that did not begin in the middle of its answer, by order of finishing.
  std::vector<double> first_token_ns, end_to_end_ns;
  std::vector<double> in_batch_ns;  // from joining to the last token
};

class Server {
 public:
  Server(System* system, std::vector<Request> requests, const ServeOptions& options);
  // At most `stages` more; false when no request is left.
  bool advance(int64_t stages);
  const ServeReport& report() const { return report_; }

 private:
  struct Running {
    Request request;
    int64_t generated, channel, part;
    double joined_ns, bytes;  // of memory on each device that has its keys, all that it will become

    bool fresh() const { return request.generated == 0; }
  };
  double bytes_of(const Request& q) const;
  bool admit(Stage* stage);
  void join();
  size_t place(size_t first);
  int64_t least_filled(double bytes, const std::vector<double>& free) const;
  int64_t group(const Running& r) const { return r.part % system_->split().data; }

  System* system_;
  std::vector<Request> requests_;  // by arrival
  ServeOptions options_;
  size_t next_ = 0;
  int64_t turn_ = 0;
  double room_bytes_ = 0;  // of a channel with units, else of a device
  std::vector<Running> running_;
  ServeReport report_;
};

}  // namespace effops::pim
