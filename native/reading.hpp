// How fast memory can be read: what attention over many keys is measured against.
#pragma once

#include <cstddef>
#include <cstdint>

namespace twofold {

// The sum of all whole 64-bit words, wrapping around; read by up to `threads` threads.
uint64_t read(const char* data, size_t bytes, int threads);

}  // namespace twofold
