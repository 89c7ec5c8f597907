#include "reading.hpp"

#include <atomic>
#include <cstring>

#include "crew.hpp"

namespace twofold {

uint64_t read(const char* data, size_t bytes, int threads) {
    constexpr size_t PIECE = 1 << 18, LINE = 64, AHEAD = 4096;  // what one thread reads at a time, and how far before it needs them lines are asked for
    const size_t lines = bytes / LINE * LINE;
    std::atomic<uint64_t> total{0};
    share(static_cast<int64_t>((lines + PIECE - 1) / PIECE), threads, [&](int64_t index) {
        const size_t first = static_cast<size_t>(index) * PIECE, last = first + PIECE < lines ? first + PIECE : lines;
        uint64_t sums[8] = {};
        for (size_t at = first; at < last; at += LINE) {
            __builtin_prefetch(data + at + AHEAD);
            uint64_t words[8];
            std::memcpy(words, data + at, LINE);
            for (int i = 0; i < 8; ++i) sums[i] += words[i];
        }
        for (const uint64_t sum : sums) total.fetch_add(sum, std::memory_order_relaxed);
    });
    for (size_t at = lines; at + 8 <= bytes; at += 8) {
        uint64_t word;
        std::memcpy(&word, data + at, 8);
        total += word;
    }
    return total;
}

}  // namespace twofold
