// Operating-system threads that wait for launches.
#pragma once

namespace effops::device::simt {

// Calls work(context) on this thread and on up to `others` waiting ones at the same time, and returns when all have
// returned. Of launches at the same time one gets the others.
void run_on_workers(int others, void (*work)(void*), void* context);

}  // namespace effops::device::simt
