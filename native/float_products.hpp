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

// Queries, packed, and rows of keys, whose products are logits.
template <class Number>
struct Factors {
    const Number* query = nullptr;
    const Number* keys = nullptr;
    int64_t dim = 0, stride = 0;
};
// A logit is the sum of two such products: of the dimensions as they are, and of those that have turned.
template <class Number, class Turned = Number>
struct TwoFactors {
    Factors<Number> still;
    Factors<Turned> turned;
};

// Rows of keys of which dimension i turns with dimension i + distance; rows of cosines and sines by which they turn, and scales by which they are multiplied
// before, or none, both arranged.
template <class Number>
struct Turning {
    const Number* keys;
    int64_t stride, distance, pairs;
    const float *turns, *scale;
};

// Of W pairs that turn the first numbers, and the second ones.
struct Both {
    Floats a, b;
};

// Calls work(std::integral_constant<int, R>, row) for all rows, four, two or one at a time.
template <class Work>
inline void by_rows(int64_t rows, Work work) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) work(std::integral_constant<int, 4>{}, row);
    if (row + 2 <= rows) work(std::integral_constant<int, 2>{}, row), row += 2;
    if (row < rows) work(std::integral_constant<int, 1>{}, row);
}

struct FloatProducts {
    using Number = float;  // in which rows are multiplied as they lie
    using Turned = float;  // and those that have turned
    static constexpr int STEP = W;  // a row is a whole number of these
    static constexpr int KEYS = 1;  // so is the number of keys
    static constexpr int ACCUMULATORS = W == 16 ? 16 : 8;

    static void start() {}
    static void stop() {}
    static void put(float* to, Floats x) { store(to, x); }
    static void narrow(const float* from, float* to, int64_t count) { std::memcpy(to, from, static_cast<size_t>(count) * 4); }
    static int64_t packed_numbers(int64_t rows, int64_t dim) { return rows * dim; }
    static int64_t packed_turned_numbers(int64_t rows, int64_t dim) { return rows * dim; }
    static void pack(const float* query, int64_t rows, int64_t dim, float* to) { narrow(query, to, rows * dim); }
    static size_t scratch_bytes(int64_t, int64_t) { return 0; }

    static constexpr int PAIRS = W;            // a row of turned numbers has a whole number of these
    static constexpr float BEFORE_CUT = 1.0f;  // by which cosines and sines of keys are multiplied

    // One number of each of `count` pairs, in the order in which pairs turn, filled up with zeros.
    static void arrange(const float* from, int64_t count, float* to) {
        for (int64_t i = 0; i < count; i += W) store(to + i, load(from + i, count - i));
    }

    // Queries that were turned, packed: of each row all first numbers of pairs, then all second ones. `turned(row, i)` gives pairs [i, i + W) of them.
    template <class Turned>
    static void pack_turned(int64_t rows, int64_t wide, Turned turned, float* to) {
        for (int64_t r = 0; r < rows; ++r, to += 2 * wide) {
            for (int64_t i = 0; i < wide; i += W) {
                const Both both = turned(r, i);
                store(to + i, both.a), store(to + wide + i, both.b);
            }
        }
    }

    // `count` keys turned: key middle + k by row k, (a, b) -> (a cos - b sin, a sin + b cos), and key middle - k back by row k, so a row is read for two keys.
    static void turn(const Turning<float>& turning, int64_t middle, int64_t count, float* to, Ahead& ahead) {
        const auto [keys, stride, distance, pairs, turns, scale] = turning;
        const int64_t wide = up(pairs, W);
        for (int64_t k = 0; k <= middle; ++k) {
            ahead.go(pairs * 4 / W);
            for (int64_t i = 0; i < pairs; i += W) {
                const Floats c = load(turns + k * 2 * wide + i), s = load(turns + (2 * k + 1) * wide + i);
                const auto turn_one = [&](int64_t key, Floats sine) {
                    const float* from = keys + key * stride + i;
                    Floats x = load(from, pairs - i), y = load(from + distance, pairs - i);
                    if (scale) x *= load(scale + i), y *= load(scale + wide + i);
                    store(to + key * 2 * wide + i, x * c - y * sine);
                    store(to + (2 * key + 1) * wide + i, y * c + x * sine);
                };
                if (middle + k < count) turn_one(middle + k, s);
                if (k > 0) turn_one(middle - k, -s);
            }
        }
    }

    // out[row * TILE + key] += query[row] . key
    static void logits(const TwoFactors<float>& factors, int64_t rows, int64_t count, float* out, char*, Ahead& ahead) {
        for (const Factors<float>& factor : {factors.still, factors.turned})
            if (factor.dim) add_products(factor, rows, count, out, ahead);
    }

    static void add_products(const Factors<float>& factor, int64_t rows, int64_t count, float* out, Ahead& ahead) {
        const auto [query, keys, dim, stride] = factor;
        by_rows(rows, [=, &ahead](auto number, int64_t row) {
            constexpr int R = decltype(number)::value, K = ACCUMULATORS / R;
            int64_t key = 0;
            for (; key + K <= count; key += K) {
                block<R, K>(query + row * dim, dim, keys + key * stride, stride, out + row * twofold::TILE + key);
                ahead.go(R * K * dim / W / 2);
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
            for (; i + C * W <= dim; i += C * W) columns<R, C>(weight, values + i, stride, count, to + i, out_stride, ahead);
            for (; i + 2 * W <= dim; i += 2 * W) columns<R, 2>(weight, values + i, stride, count, to + i, out_stride, ahead);
            for (; i < dim; i += W) columns<R, 1>(weight, values + i, stride, count, to + i, out_stride, ahead);
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
    static void columns(const float* weights, const float* values, int64_t stride, int64_t count, float* out, int64_t out_stride, Ahead& ahead) {
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
        ahead.go(count * (R * C < 6 ? 3 : R * C / 2));  // sums that are few wait for each other
    }
};

}  // namespace
