// Threads that stay: those of OpenMP where the process has it, or a crew of our own, made when it is first needed and anew after a fork.
#pragma once

#include <cstdint>
#include <functional>

namespace twofold {

// Calls work(index) for every index below `count`, on up to `threads` threads, this one among them. While another call has our crew, this thread does
// all of it alone: callers never wait for one another. `work` must not throw.
void share(int64_t count, int threads, const std::function<void(int64_t)>& work);

}  // namespace twofold
