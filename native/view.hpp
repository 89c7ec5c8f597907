// Which keys of a tile are seen, by which of the queries.
#pragma once

#include <cstring>

#include "call.hpp"

namespace {

using namespace twofold;

// What the T queries of a sequence see of a tile.
enum class Sight { none, some, all };

struct View {
    uint8_t* seen;    // [T, TILE]
    uint8_t* hidden;  // [TILE]: seen by none

    Sight look(const Call& call, int64_t sequence, int64_t first, int64_t count) const {
        if (!call.key_positions && !call.key_mask) {
            const Sight plain = of_intervals(call, sequence, first, count);
            if (plain != Sight::some) return plain;
        }
        int64_t total = 0;
        std::memset(hidden, 1, TILE);
        for (int64_t t = 0; t < call.queries; ++t) {
            for (int64_t i = 0; i < count; ++i) {
                const bool sees = is_seen(call, sequence, t, first + i);
                seen[t * TILE + i] = sees;
                hidden[i] &= !sees;
                total += sees;
            }
        }
        return total == 0 ? Sight::none : total == count * call.queries ? Sight::all : Sight::some;
    }

   private:
    static int64_t place(const Call& call, int64_t sequence, int64_t t) {
        return call.query_positions ? call.query_positions[t] : call.length(sequence) - call.queries + t;
    }

    static bool is_seen(const Call& call, int64_t sequence, int64_t t, int64_t token) {
        const int64_t query = place(call, sequence, t), key = call.key_positions ? call.key_positions[token] : token;
        if (key < 0 || query < 0 || token >= call.length(sequence)) return false;
        if (call.is_causal && key > query) return false;
        if (call.window && (key > query ? key - query : query - key) >= call.window) return false;
        return !call.key_mask || call.key_mask[sequence * call.mask_batch_stride + token * call.mask_row_stride];
    }

    // The keys that a query sees are successive here.
    static Sight of_intervals(const Call& call, int64_t sequence, int64_t first, int64_t count) {
        bool none = true, every = true;
        for (int64_t t = 0; t < call.queries; ++t) {
            const int64_t query = place(call, sequence, t);
            int64_t begin = 0, end = query < 0 ? 0 : call.length(sequence);
            if (call.is_causal && end > query + 1) end = query + 1;
            if (call.window) {
                if (begin < query - call.window + 1) begin = query - call.window + 1;
                if (end > query + call.window) end = query + call.window;
            }
            none &= first >= end || first + count <= begin;
            every &= first >= begin && first + count <= end;
        }
        return none ? Sight::none : every ? Sight::all : Sight::some;
    }
};

}  // namespace
