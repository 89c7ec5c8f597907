// The two products of a tile in bfloat16, summed in floats: by the dot instruction of AVX-512 (two numbers a lane), or by the tiles of AMX (16 x 32 x 16).
//
// Sums of values need keys in pairs, [keys / 2, dim, 2]: two rows of keys are woven into one as they are read.
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

// How a key turns: for 16 pairs (a, b), in the order in which they are woven, (cos, sin), for the products with (a, -b) and with (b, a). With scales of a and b
// in them these are different numbers, (cos a, sin b) and (cos b, sin a), one after the other.
struct WovenTurns {
    using Turn = uint16_t;
    static constexpr bool TURNS = true;
    static int64_t turns(int64_t pairs, bool scaled) { return (scaled ? 4 : 2) * up(pairs, 32); }

    static constexpr int PAIRS = 32;  // a row of turned numbers has a whole number of these

    // `pairs` numbers, each brought to where it is once it is turned: woven, and then the two vectors one number after the other; filled up with 0.
    static void arrange(const float* from, int64_t pairs, float* to) {
        alignas(64) static const int32_t FIRST[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
        const __m512i first = _mm512_load_si512(FIRST);
        for (int64_t i = 0; i < up(pairs, PAIRS); i += 16) _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(first, _mm512_maskz_loadu_ps(low_bits(pairs - i, 16), from + i)));
    }

    // Of 32 pairs the first woven vector holds 0-3, 8-11, 16-19 and 24-27.
    static void make_turn(const float* cosine, const float* sine, const float* scale_a, const float* scale_b, int64_t pairs, bool scaled, uint16_t* to) {
        const int64_t step = scaled ? 128 : 64;
        for (int64_t first = 0; first < pairs; first += PAIRS) {
            float wide[128] = {};
            for (int64_t j = 0; j < PAIRS && first + j < pairs; ++j) {
                const int64_t i = first + j;
                float* two = wide + (j % 8 < 4 ? 0 : step / 2) + (j / 8 * 4 + j % 4) * 2;
                two[0] = cosine[i] * scale_a[i], two[1] = sine[i] * scale_b[i];
                if (scaled) two[32] = cosine[i] * scale_b[i], two[33] = sine[i] * scale_a[i];
            }
            narrow_row(wide, to + first / PAIRS * step, step);
        }
    }

    // (a, b) -> (a cos - b sin, b cos + a sin): first all a, then all b.
    template <bool Scaled>
    static void turn(const uint16_t* a, const uint16_t* b, const uint16_t* by, int64_t pairs, uint16_t* to) {
        constexpr int64_t STEP = Scaled ? 128 : 64;
        const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
        uint16_t* second = to + up(pairs, PAIRS);
        for (int64_t i = 0; i < pairs; i += PAIRS, by += STEP) {
            const auto here = static_cast<__mmask32>(low_bits(pairs - i, 32));
            const __m512i x = _mm512_maskz_loadu_epi16(here, a + i), y = _mm512_maskz_loadu_epi16(here, b + i), minus_y = _mm512_xor_si512(y, sign);
            const __m512i low = _mm512_loadu_si512(by), high = _mm512_loadu_si512(by + STEP / 2);
            const __m512i other_low = Scaled ? _mm512_loadu_si512(by + 32) : low, other_high = Scaled ? _mm512_loadu_si512(by + STEP / 2 + 32) : high;
            _mm512_storeu_si512(to + i, both_of(product(_mm512_unpacklo_epi16(x, minus_y), low), product(_mm512_unpackhi_epi16(x, minus_y), high)));
            _mm512_storeu_si512(second + i, both_of(product(_mm512_unpacklo_epi16(y, x), other_low), product(_mm512_unpackhi_epi16(y, x), other_high)));
        }
    }

   private:
    static __m512 product(__m512i x, __m512i y) { return _mm512_dpbf16_ps(_mm512_setzero_ps(), reinterpret_cast<Pairs>(x), reinterpret_cast<Pairs>(y)); }
    // Two vectors of floats rounded to the nearest, ties away from 0, in one: the instruction made for it takes several times as long.
    static __m512i both_of(__m512 low, __m512 high) {
        const __m512i half = _mm512_set1_epi32(0x8000);
        const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(low), half), 16), odd = _mm512_add_epi32(_mm512_castps_si512(high), half);
        return _mm512_mask_blend_epi16(0xaaaaaaaa, even, odd);
    }
    static uint32_t low_bits(int64_t count, int64_t most) {
        const int64_t set = count < 0 ? 0 : count < most ? count : most;
        return static_cast<uint32_t>((uint64_t{1} << set) - 1);
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
    static void pack(const float* query, int64_t rows, int64_t dim, uint16_t* to) { narrow_row(query, to, rows * dim); }
    static size_t scratch_bytes(int64_t rows, int64_t) { return static_cast<size_t>(rows * twofold::TILE * 2); }

    static void logits(const uint16_t* query, int64_t rows, int64_t dim, const uint16_t* keys, int64_t stride, int64_t count, float* out, char*, Ahead& ahead) {
        by_rows(rows, [&](auto number, int64_t row) {
            constexpr int R = decltype(number)::value, K = 16 / R;
            int64_t key = 0;
            for (; key + K <= count; key += K) {
                block<R, K>(query + row * dim, dim, keys + key * stride, stride, out + row * twofold::TILE + key);
                ahead.go(2 * K);
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
            for (; i + C * 32 <= dim; i += C * 32) {
                columns<R, C>(weight, values + i, stride, count, to + i, out_stride);
                ahead.go(count);
            }
            for (; i < dim; i += 32) columns<R, 1>(weight, values + i, stride, count, to + i, out_stride);
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
    static void columns(const uint16_t* weights, const uint16_t* values, int64_t stride, int64_t count, float* out, int64_t out_stride) {
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
    }
};

#if defined(__AMX_BF16__)
struct TileProducts : Tiles, WovenTurns {
    using Number = uint16_t;
    static constexpr int STEP = 32;
    static constexpr int KEYS = 32;
    static constexpr int64_t PIECE = SIDE * 32;  // numbers of a tile

    static void put(uint16_t* to, Floats x) { put_narrow(to, x); }
    static void narrow(const float* from, uint16_t* to, int64_t count) { narrow_row(from, to, count); }
    static int64_t blocks(int64_t rows) { return (rows + SIDE - 1) / SIDE; }
    static int64_t packed_numbers(int64_t rows, int64_t dim) { return blocks(rows) * SIDE * dim; }

    // Right sides of a product: [blocks of 16 queries, dim / 32, 16 pairs of dimensions, 16 queries, 2], into memory that was 0.
    static void pack(const float* query, int64_t rows, int64_t dim, uint16_t* to) {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < dim; i += 32) {
                uint16_t narrow[32];
                narrow_row(query + r * dim + i, narrow, 32);
                uint16_t* piece = to + (r / SIDE * (dim / 32) + i / 32) * PIECE + r % SIDE * 2;
                for (int pair = 0; pair < 16; ++pair) std::memcpy(piece + pair * 32, narrow + 2 * pair, 4);
            }
        }
    }

    static size_t scratch_bytes(int64_t rows, int64_t) {
        const int64_t sums_of_logits = twofold::TILE * SIDE * 4, weights = blocks(rows) * SIDE * twofold::TILE * 2, woven = twofold::TILE * 64 * 2;
        return static_cast<size_t>(sums_of_logits + weights + woven);
    }

    static void logits(const uint16_t* query, int64_t rows, int64_t dim, const uint16_t* keys, int64_t stride, int64_t count, float* out, char* scratch, Ahead& ahead) {
        float* found = reinterpret_cast<float*>(scratch);  // [TILE, 16]
        const Ints down = lanes() * static_cast<int32_t>(SIDE);
        for (int64_t block = 0; block < blocks(rows); ++block) {
            int64_t key = 0;
            for (; key + 64 <= count; key += 64) products<4>(query + block * SIDE * dim, dim, keys + key * stride, stride, found + key * SIDE, ahead);
            for (; key < count; key += 32) products<2>(query + block * SIDE * dim, dim, keys + key * stride, stride, found + key * SIDE, ahead);
            const int64_t in_block = rows - block * SIDE < SIDE ? rows - block * SIDE : SIDE;
            for (int64_t r = 0; r < in_block; ++r) {
                float* to = out + (block * SIDE + r) * twofold::TILE;
                for (int64_t key = 0; key < count; key += 16) {
                    const __m512 turned = _mm512_i32gather_ps(reinterpret_cast<__m512i>(down), found + key * SIDE + r, 4);
                    _mm512_storeu_ps(to + key, _mm512_add_ps(_mm512_loadu_ps(to + key), turned));
                }
            }
        }
    }

    // A few columns at a time, so that what is woven stays near.
    static void sums(const float* weights, int64_t rows, int64_t dim, const uint16_t* values, int64_t stride, int64_t count, float* out, int64_t out_stride, char* scratch, Ahead& ahead) {
        uint16_t* left = reinterpret_cast<uint16_t*>(scratch + twofold::TILE * SIDE * 4);  // [blocks, 16, TILE]
        uint16_t* woven = left + blocks(rows) * SIDE * twofold::TILE;                      // [keys / 32, columns / 16, 16 pairs of keys, 16, 2]
        narrow_row(weights, left, rows * twofold::TILE);
        int64_t i = 0;
        for (; i + 64 <= dim; i += 64) columns<2>(left, rows, values + i, stride, count, out + i, out_stride, woven, ahead);
        if (i < dim) columns<1>(left, rows, values + i, stride, count, out + i, out_stride, woven, ahead);
    }

   private:
    static Ints lanes() {
        Ints found;
        for (int i = 0; i < W; ++i) found[i] = i;
        return found;
    }

    // 16 queries and two or four times 16 keys: found[key, query]. Four sums at a time hide how long a product takes.
    template <int Blocks>
    static void products(const uint16_t* query, int64_t dim, const uint16_t* keys, int64_t stride, float* found, Ahead& ahead) {
        const int64_t step = SIDE * stride;
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (Blocks == 4) _tile_zero(2);
        if constexpr (Blocks == 4) _tile_zero(3);
        for (int64_t i = 0; i < dim; i += 32) {
            _tile_loadd(6, query + i * SIDE, 64);
            _tile_loadd(4, keys + i, stride * 2);
            _tile_loadd(5, keys + step + i, stride * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if constexpr (Blocks == 4) {
                _tile_loadd(4, keys + 2 * step + i, stride * 2);
                _tile_loadd(5, keys + 3 * step + i, stride * 2);
                _tile_dpbf16ps(2, 4, 6);
                _tile_dpbf16ps(3, 5, 6);
            }
            ahead.go(4 * Blocks);
        }
        _tile_stored(0, found, 64);
        _tile_stored(1, found + SIDE * SIDE, 64);
        if constexpr (Blocks == 4) _tile_stored(2, found + 2 * SIDE * SIDE, 64);
        if constexpr (Blocks == 4) _tile_stored(3, found + 3 * SIDE * SIDE, 64);
    }

    // All queries and once or twice 32 dimensions.
    template <int Blocks>
    static void columns(const uint16_t* left, int64_t rows, const uint16_t* values, int64_t stride, int64_t count, float* out, int64_t out_stride, uint16_t* woven, Ahead& ahead) {
        for (int64_t key = 0; key < count; key += 2) {
            const uint16_t* from = values + key * stride;
            uint16_t* to = woven + key / 32 * (2 * Blocks) * PIECE + key % 32 / 2 * 32;
            for (int64_t b = 0; b < Blocks; ++b) {
                const Woven two = weave(from + b * 32, from + stride + b * 32);
                _mm512_storeu_si512(to + 2 * b * PIECE, two.low);
                _mm512_storeu_si512(to + (2 * b + 1) * PIECE, two.high);
            }
            if (key % 4 == 0) ahead.go(Blocks + 1);
        }
        for (int64_t block = 0; block < blocks(rows); ++block)
            add_columns<Blocks>(left + block * SIDE * twofold::TILE, rows - block * SIDE, woven, count, out + block * SIDE * out_stride, out_stride);
        ahead.go(8 * Blocks);
    }

    // 16 queries and once or twice 32 dimensions.
    template <int Blocks>
    static void add_columns(const uint16_t* left, int64_t rows, const uint16_t* woven, int64_t count, float* out, int64_t out_stride) {
        alignas(64) float whole[4][SIDE * SIDE];
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (Blocks == 2) _tile_zero(2);
        if constexpr (Blocks == 2) _tile_zero(3);
        for (int64_t key = 0; key < count; key += 32, woven += 2 * Blocks * PIECE) {
            _tile_loadd(4, left + key, twofold::TILE * 2);
            _tile_loadd(6, woven, 64);
            _tile_loadd(7, woven + PIECE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (Blocks == 2) {
                _tile_loadd(6, woven + 2 * PIECE, 64);
                _tile_loadd(7, woven + 3 * PIECE, 64);
                _tile_dpbf16ps(2, 4, 6);
                _tile_dpbf16ps(3, 4, 7);
            }
        }
        _tile_stored(0, whole[0], 64);
        _tile_stored(1, whole[1], 64);
        if constexpr (Blocks == 2) _tile_stored(2, whole[2], 64);
        if constexpr (Blocks == 2) _tile_stored(3, whole[3], 64);
        for (int64_t r = 0; r < (rows < SIDE ? rows : SIDE); ++r)
            for (int64_t b = 0; b < Blocks; ++b) add_woven(out + r * out_stride + b * 32, _mm512_load_ps(whole[2 * b] + r * SIDE), _mm512_load_ps(whole[2 * b + 1] + r * SIDE));
    }
};
#endif

}  // namespace
