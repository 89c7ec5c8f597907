// The two products of a tile, in floats: logits of queries and keys, and sums of values. Rows that are stored as anything else are widened before (tile.hpp).
#pragma once

#include "call.hpp"
#include "vectors.hpp"

namespace {

inline int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// out[r * TILE + k] += the sum of found[r * K + k]
template <int R, int K>
inline void add_sums(Floats* found, float* out) {
    if constexpr (R * K % W == 0) {
        for (int first = 0; first < R * K; first += W) {
            merge(found + first);
            for (int lane = 0; lane < W; ++lane) out[(first + lane) / K * twofold::TILE + (first + lane) % K] += found[first][lane];
        }
    } else {
        for (int r = 0; r < R; ++r)
            for (int k = 0; k < K; ++k) out[r * twofold::TILE + k] += sum(found[r * K + k]);
    }
}

// Calls work(std::integral_constant<int, R>, row) for all rows, four, two or one at a time.
template <class Work>
inline void by_rows(int64_t rows, Work work) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) work(std::integral_constant<int, 4>{}, row);
    if (row + 2 <= rows) work(std::integral_constant<int, 2>{}, row), row += 2;
    if (row < rows) work(std::integral_constant<int, 1>{}, row);
}

struct FloatProducts {
    using Number = float;
    static constexpr int STEP = W;  // a row is a whole number of these
    static constexpr int KEYS = 1;  // so is the number of keys
    static constexpr int ACCUMULATORS = W == 16 ? 16 : 8;

    static void start() {}
    static void stop() {}
    static void put(float* to, Floats x) { store(to, x); }
    static void narrow(const float* from, float* to, int64_t count) { std::memcpy(to, from, static_cast<size_t>(count) * 4); }
    static int64_t packed_numbers(int64_t rows, int64_t dim) { return rows * dim; }
    static void pack(const float* query, int64_t rows, int64_t dim, float* to) { narrow(query, to, rows * dim); }
    static size_t scratch_bytes(int64_t, int64_t) { return 0; }

    // How a key turns: the cosine and the sine of each pair, and the scales of its two dimensions in them.
    using Turn = float;
    static constexpr bool TURNS = true;
    static constexpr int PAIRS = W;  // a row of turned numbers has a whole number of these
    static int64_t turns(int64_t pairs, bool) { return 4 * up(pairs, W); }

    // `pairs` numbers, each brought to where it is once it is turned; filled up with 0.
    static void arrange(const float* from, int64_t pairs, float* to) {
        narrow(from, to, pairs);
        for (int64_t i = pairs; i < up(pairs, W); ++i) to[i] = 0;
    }

    static void make_turn(const float* cosine, const float* sine, const float* scale_a, const float* scale_b, int64_t pairs, bool, float* to) {
        std::memset(to, 0, static_cast<size_t>(turns(pairs, true)) * 4);
        for (int64_t i = 0; i < pairs; ++i) {
            float* at = to + 4 * (i / W * W) + i % W;
            at[0] = cosine[i] * scale_a[i], at[W] = sine[i] * scale_b[i], at[2 * W] = cosine[i] * scale_b[i], at[3 * W] = sine[i] * scale_a[i];
        }
    }

    // (a, b) -> (a cos - b sin, b cos + a sin): first all a, then all b.
    template <bool Scaled>
    static void turn(const float* a, const float* b, const float* by, int64_t pairs, float* to) {
        float* second = to + up(pairs, W);
        for (int64_t i = 0; i < pairs; i += W, by += 4 * W) {
            const Floats x = load(a + i, pairs - i), y = load(b + i, pairs - i);
            store(to + i, x * load(by) - y * load(by + W));
            store(second + i, y * load(by + 2 * W) + x * load(by + 3 * W));
        }
    }

    // out[row * TILE + key] += query[row] . key
    static void logits(const float* query, int64_t rows, int64_t dim, const float* keys, int64_t stride, int64_t count, float* out, char*, Ahead& ahead) {
        by_rows(rows, [&](auto number, int64_t row) {
            constexpr int R = decltype(number)::value, K = ACCUMULATORS / R;
            int64_t key = 0;
            for (; key + K <= count; key += K) {
                block<R, K>(query + row * dim, dim, keys + key * stride, stride, out + row * twofold::TILE + key);
                ahead.go(2 * K);
            }
            for (; key < count; ++key) block<R, 1>(query + row * dim, dim, keys + key * stride, stride, out + row * twofold::TILE + key);
        });
    }

    // out[row * out_stride + i] += weights[row * TILE + key] * values[key][i]
    static void sums(const float* weights, int64_t rows, int64_t dim, const float* values, int64_t stride, int64_t count, float* out, int64_t out_stride, char*, Ahead& ahead) {
        by_rows(rows, [&](auto number, int64_t row) {
            constexpr int R = decltype(number)::value, C = ACCUMULATORS / R;
            const float* weight = weights + row * twofold::TILE;
            float* to = out + row * out_stride;
            int64_t i = 0;
            for (; i + C * W <= dim; i += C * W) {
                columns<R, C>(weight, values + i, stride, count, to + i, out_stride);
                ahead.go(count);
            }
            for (; i + 2 * W <= dim; i += 2 * W) columns<R, 2>(weight, values + i, stride, count, to + i, out_stride);
            for (; i < dim; i += W) columns<R, 1>(weight, values + i, stride, count, to + i, out_stride);
        });
    }

   private:
    template <int R, int K>
    static void block(const float* query, int64_t dim, const float* keys, int64_t stride, float* out) {
        Floats found[R * K] = {};
        for (int64_t i = 0; i < dim; i += W) {
            Floats q[R];
            for (int r = 0; r < R; ++r) q[r] = load(query + r * dim + i);
            for (int k = 0; k < K; ++k) {
                const Floats key = load(keys + k * stride + i);
                for (int r = 0; r < R; ++r) found[r * K + k] += q[r] * key;
            }
        }
        add_sums<R, K>(found, out);
    }

    template <int R, int C>
    static void columns(const float* weights, const float* values, int64_t stride, int64_t count, float* out, int64_t out_stride) {
        Floats found[R * C] = {};  // a tile's sums by themselves: added one by one to those of all keys they would lose more
        for (int64_t key = 0; key < count; ++key) {
            Floats value[C];
            for (int c = 0; c < C; ++c) value[c] = load(values + key * stride + c * W);
            for (int r = 0; r < R; ++r) {
                const Floats weight = all(weights[r * twofold::TILE + key]);
                for (int c = 0; c < C; ++c) found[r * C + c] += weight * value[c];
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) store(out + r * out_stride + c * W, load(out + r * out_stride + c * W) + found[r * C + c]);
    }
};

}  // namespace
