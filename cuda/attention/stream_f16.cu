#include "attention/stream_launch.h"

namespace effops::device {

template int launch_stream<f16>(const AttentionParams&, void*);

}  // namespace effops::device
