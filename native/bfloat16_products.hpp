// The two products of a tile in bfloat16, summed in floats: by the dot instruction of AVX-512 (two numbers a lane), or by the tiles of AMX (16 x 32 x 16).
//
// Sums of values need pairs of keys for the dot instruction, [keys / 2, dim, 2]: two rows of keys are woven into one as they are read. For tiles pairs of dimensions
// do, which is how keys lie: each of the two is multiplied by a weight, and the other by 0. So what is infinite or no number in one is no number in the other.
#pragma once

#include <immintrin.h>

#include "float_products.hpp"

#if defined(__AMX_BF16__)
#include "amx_tiles.hpp"
#endif

namespace {

using Pairs = __m512bh;

inline Pairs pairs_of(const uint16_t* p) { return reinterpret_cast<Pairs>(_mm512_loadu_si512(p)); }

// Rounds to the nearest, ties to even; 32 numbers at a time, and the rest by one masked step.
inline void narrow_row(const float* from, uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 rest = count - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - i)) - 1);
        const __m256bh narrow = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, from + i));
        _mm256_mask_storeu_epi16(to + i, rest, reinterpret_cast<__m256i>(narrow));
    }
}

inline void put_narrow(uint16_t* to, Floats x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x))); }

// Two rows of 32 numbers, woven into pairs in the order that costs one instruction each: `low` has the dimensions 0-3, 8-11, 16-19 and 24-27.
struct Woven {
    __m512i low, high;
};
inline Woven weave(const uint16_t* a, const uint16_t* b) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    return {_mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y)};
}

// Adds to 32 numbers the sums of such pairs, in the order of the dimensions.
inline void add_woven(float* to, __m512 low, __m512 high) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_permutex2var_ps(low, first, high)));
    _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), _mm512_permutex2var_ps(low, last, high)));
}

// Two vectors of floats in one, number by number, cut off after 8 bits.
inline __m512i both_of(__m512 even, __m512 odd) {
    const __m512i high_half_to_low = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 0, 0, 6, 7, 0, 0, 10, 11, 0, 0, 14, 15, 0, 0));
    return _mm512_mask_shuffle_epi8(_mm512_castps_si512(odd), 0x3333333333333333, _mm512_castps_si512(even), high_half_to_low);
}

// Keys of bfloat16, or codes, turn 32 pairs at a time, those of even places and those of odd ones: a vector of numbers is widened so by few cheap instructions. What has
// turned is bfloat16 and lies in pairs. The products are ones of floats: two of bfloat16 at a time cost more.
struct WovenTurns {
    using Turned = uint16_t;
    static constexpr int PAIRS = 16;  // a row of turned numbers has a whole number of these
    // To cut off costs less than to round, but makes numbers smaller: m 2^e, 1 <= m < 2, by 2^(e - 8) in the mean, the 2^-8 / m th part of it, which is 2^-8 / (2 ln 2)
    // in the mean where ln m is spread evenly, as it is in products. They are made larger by so much before. A number that has 8 bits stays what it was.
    static constexpr float BEFORE_CUT = 1 + 0.72134752f / 256;

    // One number of each of `count` pairs, in the order in which pairs turn, filled up with zeros.
    static void arrange(const float* from, int64_t count, float* to) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        int64_t i = 0;
        for (; count - i > W; i += 2 * W) {
            const __m512 low = load(from + i), high = load(from + i + W, count - i - W);
            store(to + i, _mm512_permutex2var_ps(low, even, high));
            store(to + i + W, _mm512_permutex2var_ps(low, odd, high));
        }
        if (i < count) store(to + i, load(from + i, count - i));
    }

    // `count` keys turned: key middle + k by row k, (a, b) -> (a cos - b sin, a sin + b cos), and key middle - k back by row k, so a row is read for two keys.
    template <class Stored>
    static void turn(const Turning<Stored>& turning, int64_t middle, int64_t count, uint16_t* to, Ahead& ahead) {
        turning.scale ? turn_keys<true>(turning, middle, count, to, ahead) : turn_keys<false>(turning, middle, count, to, ahead);
    }

   private:
    template <bool Scaled, class Stored>
    static void turn_keys(const Turning<Stored>& turning, int64_t middle, int64_t count, uint16_t* to, Ahead& ahead) {
        const auto [keys, stride, distance, pairs, turns, scale] = turning;
        const int64_t wide = up(pairs, PAIRS);
        for (int64_t k = 0; k <= middle; ++k) {
            ahead.go(pairs / 4);  // less than it takes: keys come from the second level meanwhile
            const bool is_forth = middle + k < count, is_back = k > 0;
            const Stored *forth = keys + (middle + k) * stride, *back = keys + (middle - k) * stride;
            uint16_t *to_forth = to + (middle + k) * 2 * wide, *to_back = to + (middle - k) * 2 * wide;
            const float *cosine = turns + k * 2 * wide, *sine = cosine + wide;
            int64_t i = 0;
            for (; pairs - i > W; i += 2 * W) {
                const Floats c[] = {load(cosine + i), load(cosine + i + W)}, s[] = {load(sine + i), load(sine + i + W)};
                const auto turn_two = [&](const Stored* from, Floats s0, Floats s1, uint16_t* out) {
                    const Both x = evens_and_odds(from + i, pairs - i), y = evens_and_odds(from + distance + i, pairs - i);
                    turn_one<Scaled>(x.a, y.a, c[0], s0, scale, i, wide, out + 2 * i);
                    turn_one<Scaled>(x.b, y.b, c[1], s1, scale, i + W, wide, out + 2 * i + 2 * W);
                };
                if (is_forth) turn_two(forth, s[0], s[1], to_forth);
                if (is_back) turn_two(back, -s[0], -s[1], to_back);
            }
            if (i < pairs) {
                const Floats c = load(cosine + i), s = load(sine + i);
                if (is_forth) turn_one<Scaled>(widen(forth + i, pairs - i), widen(forth + distance + i, pairs - i), c, s, scale, i, wide, to_forth + 2 * i);
                if (is_back) turn_one<Scaled>(widen(back + i, pairs - i), widen(back + distance + i, pairs - i), c, -s, scale, i, wide, to_back + 2 * i);
            }
        }
    }

    template <bool Scaled>
    static void turn_one(Floats x, Floats y, Floats c, Floats s, const float* scale, int64_t at, int64_t wide, uint16_t* to) {
        if constexpr (Scaled) x *= load(scale + at), y *= load(scale + wide + at);
        _mm512_storeu_si512(to, both_of(x * c - y * s, x * s + y * c));
    }

    // The first `count` of 32 numbers, those of even places and those of odd ones; 0 in the other places.
    static Both evens_and_odds(const uint16_t* from, int64_t count) {
        const Ints x = reinterpret_cast<Ints>(count >= 2 * W ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << count) - 1, from));
        return {floats(x << 16), floats(x & static_cast<int32_t>(0xffff0000))};
    }
    static Both evens_and_odds(const int8_t* from, int64_t count) {
        const __m256i codes = count >= 2 * W ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)) : _mm256_maskz_loadu_epi8((1u << count) - 1, from);
        const Ints x = reinterpret_cast<Ints>(_mm512_cvtepi8_epi16(codes));
        return {__builtin_convertvector(x << 16 >> 16, Floats), __builtin_convertvector(x >> 16, Floats)};
    }

    // The first `count` of 16 numbers as floats; 0 in the other places.
    static Floats widen(const uint16_t* from, int64_t count) {
        if (count >= W) return ::widen(from);
        return floats(reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from))) << 16);
    }
    static Floats widen(const int8_t* from, int64_t count) {
        if (count >= W) return ::widen(from);
        return __builtin_convertvector(reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from))), Floats);
    }
};

struct DotProducts : WovenTurns {
    using Number = uint16_t;
    static constexpr int STEP = 32;
    static constexpr int KEYS = 2;

    static void start() {}
    static void stop() {}
    static void put(uint16_t* to, Floats x) { put_narrow(to, x); }
    static void narrow(const float* from, uint16_t* to, int64_t count) { narrow_row(from, to, count); }
    static int64_t packed_numbers(int64_t rows, int64_t dim) { return rows * dim; }
    static int64_t packed_turned_numbers(int64_t rows, int64_t dim) { return rows * dim; }
    static void pack(const float* query, int64_t rows, int64_t dim, uint16_t* to) { narrow_row(query, to, rows * dim); }
    template <class Turned>
    static void pack_turned(int64_t rows, int64_t wide, Turned turned, uint16_t* to) {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < wide; i += W, to += 2 * W) {
                const Both both = turned(r, i);
                _mm512_storeu_si512(to, both_of(both.a, both.b));
            }
        }
    }
    static size_t scratch_bytes(int64_t rows, int64_t) { return static_cast<size_t>(rows * twofold::TILE * 2); }

    static void logits(const TwoFactors<uint16_t>& factors, int64_t rows, int64_t count, float* out, char*, Ahead& ahead) {
        for (const Factors<uint16_t>& factor : {factors.still, factors.turned})
            if (factor.dim) add_products(factor, rows, count, out, ahead);
    }

    static void add_products(const Factors<uint16_t>& factor, int64_t rows, int64_t count, float* out, Ahead& ahead) {
        const auto [query, keys, dim, stride] = factor;
        by_rows(rows, [=, &ahead](auto number, int64_t row) {
            constexpr int R = decltype(number)::value, K = 16 / R;
            int64_t key = 0;
            for (; key + K <= count; key += K) {
                block<R, K>(query + row * dim, dim, keys + key * stride, stride, out + row * twofold::TILE + key);
                ahead.go(R * K * dim / 32);
            }
            for (; key < count; ++key) block<R, 1>(query + row * dim, dim, keys + key * stride, stride, out + row * twofold::TILE + key);
        });
    }

    static void sums(const float* weights, int64_t rows, int64_t dim, const uint16_t* values, int64_t stride, int64_t count, float* out, int64_t out_stride, char* scratch, Ahead& ahead) {
        uint16_t* narrow_weights = reinterpret_cast<uint16_t*>(scratch);
        narrow_row(weights, narrow_weights, rows * twofold::TILE);
        by_rows(rows, [&](auto number, int64_t row) {
            constexpr int R = decltype(number)::value, C = R == 4 ? 2 : 4;
            const uint16_t* weight = narrow_weights + row * twofold::TILE;
            float* to = out + row * out_stride;
            int64_t i = 0;
            for (; i + C * 32 <= dim; i += C * 32) columns<R, C>(weight, values + i, stride, count, to + i, out_stride, ahead);
            for (; i < dim; i += 32) columns<R, 1>(weight, values + i, stride, count, to + i, out_stride, ahead);
        });
    }

   private:
    template <int R, int K>
    static void block(const uint16_t* query, int64_t dim, const uint16_t* keys, int64_t stride, float* out) {
        __m512 found[R * K];
        for (auto& x : found) x = _mm512_setzero_ps();
        for (int64_t i = 0; i < dim; i += 32) {
            Pairs q[R];
            for (int r = 0; r < R; ++r) q[r] = pairs_of(query + r * dim + i);
            for (int k = 0; k < K; ++k) {
                const Pairs key = pairs_of(keys + k * stride + i);
                for (int r = 0; r < R; ++r) found[r * K + k] = _mm512_dpbf16_ps(found[r * K + k], q[r], key);
            }
        }
        add_sums<R, K>(reinterpret_cast<Floats*>(found), out);
    }

    template <int R, int C>
    static void columns(const uint16_t* weights, const uint16_t* values, int64_t stride, int64_t count, float* out, int64_t out_stride, Ahead& ahead) {
        __m512 found[R * 2 * C];
        for (auto& x : found) x = _mm512_setzero_ps();
        for (int64_t key = 0; key < count; key += 2) {
            Pairs weight[R];
            for (int r = 0; r < R; ++r) {
                int32_t two;
                std::memcpy(&two, weights + r * twofold::TILE + key, 4);
                weight[r] = reinterpret_cast<Pairs>(_mm512_set1_epi32(two));
            }
            for (int c = 0; c < C; ++c) {
                const Woven value = weave(values + key * stride + c * 32, values + (key + 1) * stride + c * 32);
                for (int r = 0; r < R; ++r) {
                    __m512* to = found + r * 2 * C + 2 * c;
                    to[0] = _mm512_dpbf16_ps(to[0], weight[r], reinterpret_cast<Pairs>(value.low));
                    to[1] = _mm512_dpbf16_ps(to[1], weight[r], reinterpret_cast<Pairs>(value.high));
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) add_woven(out + r * out_stride + c * 32, found[r * 2 * C + 2 * c], found[r * 2 * C + 2 * c + 1]);
        ahead.go(R * C * count);
    }
};

#if defined(__AMX_BF16__)
struct TileProducts : Tiles, WovenTurns {
    using Number = uint16_t;
    static constexpr int STEP = 32;
    static constexpr int KEYS = 32;
    static constexpr int64_t PIECE = SIDE * 32;  // numbers of a tile
    static constexpr int64_t ROWS = SIDE / 2, LEFT = twofold::TILE / SIDE * PIECE;  // queries whose weights fill a left side of sums, and its numbers for a whole tile of keys

    static void put(uint16_t* to, Floats x) { put_narrow(to, x); }
    static void narrow(const float* from, uint16_t* to, int64_t count) { narrow_row(from, to, count); }
    static int64_t blocks(int64_t rows) { return (rows + SIDE - 1) / SIDE; }
    static int64_t packed_numbers(int64_t rows, int64_t dim) { return blocks(rows) * SIDE * dim; }
    static int64_t packed_turned_numbers(int64_t rows, int64_t dim) { return packed_numbers(rows, dim); }

    // Right sides of a product: [blocks of 16 queries, dim / 32, 16 pairs of dimensions, 16 queries, 2], into memory that was 0.
    static void pack(const float* query, int64_t rows, int64_t dim, uint16_t* to) {
        for (int64_t r = 0; r < rows; r += 4) {
            for (int64_t i = 0; i < dim; i += 32) {
                alignas(64) float pairs[4][16] = {};
                for (int64_t j = 0; j < 4 && r + j < rows; ++j) narrow_row(query + (r + j) * dim + i, reinterpret_cast<uint16_t*>(pairs[j]), 32);
                Floats x[4] = {load(pairs[0]), load(pairs[1]), load(pairs[2]), load(pairs[3])};
                turn_four(x);
                put_columns(x, reinterpret_cast<float*>(to + (r / SIDE * (dim / 32) + i / 32) * PIECE) + r % SIDE);
            }
        }
    }

    // The same of queries that were turned, where `turned(row, i)` gives pairs [i, i + 16) of those that are arranged; each is a pair of dimensions.
    template <class Turned>
    static void pack_turned(int64_t rows, int64_t wide, Turned turned, uint16_t* to) {
        for (int64_t r = 0; r < rows; r += 4) {
            for (int64_t i = 0; i < wide; i += W) {
                Floats x[4] = {};
                for (int64_t j = 0; j < 4 && r + j < rows; ++j) {
                    const Both both = turned(r + j, i);
                    x[j] = reinterpret_cast<Floats>(both_of(both.a, both.b));
                }
                turn_four(x);
                put_columns(x, reinterpret_cast<float*>(to + (r / SIDE * (wide / W) + i / W) * PIECE) + r % SIDE);
            }
        }
    }

    static size_t scratch_bytes(int64_t rows, int64_t) { return static_cast<size_t>(twofold::TILE * SIDE * 4 + (rows + ROWS - 1) / ROWS * LEFT * 2); }

    static void logits(const TwoFactors<uint16_t>& factors, int64_t rows, int64_t count, float* out, char* scratch, Ahead& ahead) {
        float* found = reinterpret_cast<float*>(scratch);  // [TILE, 16]
        for (int64_t block = 0; block < blocks(rows); ++block) {
            int64_t key = 0;
            for (; key + 64 <= count; key += 64) products<4>(factors, block, key, found + key * SIDE, ahead);
            for (; key < count; key += 32) products<2>(factors, block, key, found + key * SIDE, ahead);
            for (int64_t r = block * SIDE; r < rows && r < (block + 1) * SIDE; r += 4)
                for (key = 0; key < count; key += 16) {
                    add_logits(found + key * SIDE + r % SIDE, rows - r, out + r * twofold::TILE + key);
                    ahead.go(22);
                }
        }
    }

    // Rows of values are right sides as they lie: 16 pairs of neighbouring dimensions of 16 keys. The left side has each weight twice, in the row of its query
    // beside a 0 for the second dimension of a pair, and eight rows on beside a 0 for the first.
    static void sums(const float* weights, int64_t rows, int64_t dim, const uint16_t* values, int64_t stride, int64_t count, float* out, int64_t out_stride, char* scratch, Ahead& ahead) {
        uint16_t* left = reinterpret_cast<uint16_t*>(scratch + twofold::TILE * SIDE * 4);  // [blocks of 8 queries, keys / 16, 16, 16 keys, 2]
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t key = 0; key < count; key += SIDE) {
                uint16_t* to = left + r / ROWS * LEFT + key / SIDE * PIECE + r % ROWS * 2 * SIDE;
                const __m512i weight = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(weights + r * twofold::TILE + key))));
                _mm512_storeu_si512(to, weight);
                _mm512_storeu_si512(to + ROWS * 2 * SIDE, _mm512_slli_epi32(weight, 16));
            }
            ahead.go(count / 4);
        }
        for (int64_t row = 0; row < rows; row += ROWS, left += LEFT, out += ROWS * out_stride) {
            const int64_t now = rows - row < ROWS ? rows - row : ROWS;
            int64_t i = 0;
            for (; i + 128 <= dim; i += 128) columns<4>(left, now, values + i, stride, count, out + i, out_stride, ahead);
            for (; i + 64 <= dim; i += 64) columns<2>(left, now, values + i, stride, count, out + i, out_stride, ahead);
            if (i < dim) columns<1>(left, now, values + i, stride, count, out + i, out_stride, ahead);
        }
    }

   private:
    // Up to four queries and 16 keys.
    static void add_logits(const float* found, int64_t rows, float* out) {
        Floats x[4];
        for (int64_t j = 0; j < 4; ++j) x[j] = reinterpret_cast<Floats>(four_columns(found, j));
        turn_four(x);
        for (int64_t r = 0; r < 4 && r < rows; ++r) store(out + r * twofold::TILE, load(out + r * twofold::TILE) + x[r]);
    }

    // 16 queries and two or four times 16 keys: found[key, query]. Four sums at a time hide how long a product takes.
    template <int Blocks>
    static void products(const TwoFactors<uint16_t>& factors, int64_t block, int64_t key, float* found, Ahead& ahead) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (Blocks == 4) _tile_zero(2);
        if constexpr (Blocks == 4) _tile_zero(3);
        for (const auto& [query, all, dim, stride] : {factors.still, factors.turned}) {
            const uint16_t* keys = all + key * stride;
            for (int64_t i = 0; i < dim; i += 32) {
                _tile_loadd(6, query + (block * dim + i) * SIDE, 64);
                _tile_loadd(4, keys + i, stride * 2);
                _tile_loadd(5, keys + SIDE * stride + i, stride * 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 5, 6);
                if constexpr (Blocks == 4) {
                    _tile_loadd(4, keys + 2 * SIDE * stride + i, stride * 2);
                    _tile_loadd(5, keys + 3 * SIDE * stride + i, stride * 2);
                    _tile_dpbf16ps(2, 4, 6);
                    _tile_dpbf16ps(3, 5, 6);
                }
                ahead.go(20 * Blocks);
            }
        }
        _tile_stored(0, found, 64);
        _tile_stored(1, found + SIDE * SIDE, 64);
        if constexpr (Blocks == 4) _tile_stored(2, found + 2 * SIDE * SIDE, 64);
        if constexpr (Blocks == 4) _tile_stored(3, found + 3 * SIDE * SIDE, 64);
        ahead.go(16 * Blocks);
    }

    // Up to eight queries and one, two or four times 32 dimensions.
    template <int Blocks>
    static void columns(const uint16_t* left, int64_t rows, const uint16_t* values, int64_t stride, int64_t count, float* out, int64_t out_stride, Ahead& ahead) {
        alignas(64) float whole[Blocks][SIDE * SIDE];
        _tile_zero(0);
        if constexpr (Blocks > 1) _tile_zero(1);
        if constexpr (Blocks > 2) _tile_zero(2);
        if constexpr (Blocks > 2) _tile_zero(3);
        for (int64_t key = 0; key < count; key += SIDE, left += PIECE, values += SIDE * stride) {
            _tile_loadd(4, left, 64);
            _tile_loadd(6, values, stride * 2);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (Blocks > 1) {
                _tile_loadd(7, values + 32, stride * 2);
                _tile_dpbf16ps(1, 4, 7);
            }
            if constexpr (Blocks > 2) {
                _tile_loadd(6, values + 64, stride * 2);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(7, values + 96, stride * 2);
                _tile_dpbf16ps(3, 4, 7);
            }
            ahead.go(20 * Blocks);
        }
        _tile_stored(0, whole[0], 64);
        if constexpr (Blocks > 1) _tile_stored(1, whole[1], 64);
        if constexpr (Blocks > 2) _tile_stored(2, whole[2], 64);
        if constexpr (Blocks > 2) _tile_stored(3, whole[3], 64);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t b = 0; b < Blocks; ++b) add_pairs(out + r * out_stride + b * 32, load(whole[b] + r * SIDE), load(whole[b] + (r + ROWS) * SIDE));
        ahead.go((16 + 4 * rows) * Blocks);
    }

    // Adds to 32 numbers those of even and those of odd places.
    static void add_pairs(float* to, __m512 even, __m512 odd) {
        const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_permutex2var_ps(even, first, odd)));
        _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), _mm512_permutex2var_ps(even, last, odd)));
    }
};
#endif

}  // namespace
