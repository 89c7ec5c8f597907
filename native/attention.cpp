#include "attention.hpp"

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "crew.hpp"

namespace twofold {

namespace {

constexpr int64_t BYTES_WORTH_THREADS = 1 << 17;  // below this one thread is done before another has woken up

// How many keys a thread looks at before it takes other work. It waits for the first of them, so they are many where there are enough for many threads. The
// number follows from the keys alone: neither other sequences nor threads change a bit of the result.
int64_t keys_of_chunk(int64_t keys) {
    constexpr int64_t LEAST = 8 * TILE, MOST = 32 * TILE, SHARES = 16;
    const int64_t share = keys / SHARES / TILE * TILE;
    return share < LEAST ? LEAST : share > MOST ? MOST : share;
}

// Memory of a thread that is kept for its next call.
class Memory {
   public:
    char* of(size_t bytes) {
        if (bytes > size_) {
            held_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
            std::memset(held_.get(), 0, bytes < 64 ? bytes : 64);  // tile.hpp keeps a note there
            size_ = bytes;
        }
        return held_.get();
    }

   private:
    struct Free {
        void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<char, Free> held_;
    size_t size_ = 0;
};

thread_local Memory scratch_memory, parts_memory;

struct Parts {
    int64_t rows, stride, chunks;
    float* memory;

    int64_t floats_of_one() const { return rows * (2 + stride); }
    Part at(int64_t head, int64_t chunk) const {
        float* first = memory + (head * chunks + chunk) * floats_of_one();
        return {first + rows * stride, first + rows * stride + rows, first};
    }
};

// The parts of one KV head of one sequence, put together: sum of exp(g_i - g) v_i over sum of exp(g_i - g) t_i, g the greatest of all g_i and the sink.
void put_together(const Call& call, const Parts& parts, int64_t head) {
    const int64_t group = call.heads / call.kv_heads, sequence = head / call.kv_heads;
    for (int64_t r = 0; r < parts.rows; ++r) {
        const int64_t of_all = head % call.kv_heads * group + r / call.queries;
        const float sink = call.sinks ? call.sinks[of_all] : -INFINITY;
        float greatest = sink;
        for (int64_t c = 0; c < parts.chunks; ++c) greatest = std::fmax(greatest, parts.at(head, c).greatest[r]);
        float* to = call.output + ((sequence * call.heads + of_all) * call.queries + r % call.queries) * call.value_dim;
        for (int64_t i = 0; i < call.value_dim; ++i) to[i] = 0;
        float total = call.sinks && sink > -INFINITY ? std::exp(sink - greatest) : 0.0f;
        bool sees = false;
        for (int64_t c = 0; c < parts.chunks; ++c) {
            const Part part = parts.at(head, c);
            // A total is 0 where nothing was seen, and NaN, which must go on, where a key or the query was.
            if (part.total[r] == 0.0f) continue;
            sees = true;
            const float factor = part.greatest[r] == -INFINITY ? 1.0f : std::exp(part.greatest[r] - greatest);
            const float* from = part.values + r * parts.stride;
            total += factor * part.total[r];
            for (int64_t i = 0; i < call.value_dim; ++i) to[i] += factor * from[i];
        }
        if (sees)
            for (int64_t i = 0; i < call.value_dim; ++i) to[i] /= total;
    }
}

}  // namespace

void attention(const Call& given, const Level& level, int threads) {
    static std::atomic<uint64_t> calls{0};
    Call call = given;
    call.serial = ++calls;
    const int64_t heads = call.batch * call.kv_heads, chunk_keys = keys_of_chunk(call.keys), chunks = call.keys ? (call.keys + chunk_keys - 1) / chunk_keys : 1;
    if (heads == 0 || call.rows() == 0) return;
    Parts parts{call.rows(), (call.value_dim + PADDING - 1) / PADDING * PADDING, chunks, nullptr};
    parts.memory = reinterpret_cast<float*>(parts_memory.of(static_cast<size_t>(heads * chunks * parts.floats_of_one()) * sizeof(float)));
    const size_t scratch = level.scratch_bytes(call);
    std::vector<std::atomic<int64_t>> open(static_cast<size_t>(heads));
    for (auto& count : open) count.store(chunks, std::memory_order_relaxed);
    const int64_t bytes = heads * call.keys * call.key_dim * static_cast<int64_t>(bytes_of(call.key.kind));
    share(heads * chunks, bytes < BYTES_WORTH_THREADS ? 1 : threads, [&](int64_t index) {
        const int64_t head = index / chunks, chunk = index % chunks, first = chunk * chunk_keys;
        const int64_t last = first + chunk_keys < call.keys ? first + chunk_keys : call.keys;
        level.attend(call, head / call.kv_heads, head % call.kv_heads, first, last, scratch_memory.of(scratch), parts.at(head, chunk));
        if (open[static_cast<size_t>(head)].fetch_sub(1, std::memory_order_acq_rel) == 1) put_together(call, parts, head);
    });
}

}  // namespace twofold
