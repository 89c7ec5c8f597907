// The two products of a tile of codes of eight bits, by AMX (16 x 64 x 16): codes are not widened, but for those that turn, and sums of integers are exact.
//
// Queries and weights become integers of 16 bits, each row of them with a unit of its own, in two digits: a = unit * (256 high + low), |256 high + low| <= 32,639.
// That is off by 1.5e-5 of the largest number of a row at most; bfloat16 is off by 3.9e-3 of each. A row that holds NaN or infinity has such a unit, and is NaN.
#pragma once

#include <immintrin.h>

#include "bfloat16_products.hpp"

namespace {

struct CodeProducts : Tiles, WovenTurns {
    using Number = int8_t;
    static constexpr int STEP = 64;
    static constexpr int KEYS = TileProducts::KEYS;
    static constexpr int64_t ROWS = SIDE / 2, PIECE = SIDE * 64, BLOCKS = twofold::TILE / 64;  // rows in two digits that fill a tile; bytes of one; how many times 64 keys

    static bool serves(const twofold::Call& call) {
        using twofold::Kind;
        return call.key.kind == Kind::i8 && call.value.kind == Kind::i8 && call.extension_dim == 0;
    }

    static int64_t blocks(int64_t rows) { return (rows + ROWS - 1) / ROWS; }
    static int64_t block_numbers(int64_t dim) { return 64 + SIDE * dim; }
    static int64_t packed_numbers(int64_t rows, int64_t dim) { return blocks(rows) * block_numbers(dim); }

    // Blocks of 8 queries: their units, and the right sides of a product, [dim / 64, 16 times four dimensions, 16 columns, 4], into memory that was 0. The high
    // digits of four queries are in four columns side by side, and the low ones in the next four.
    static void pack(const float* query, int64_t rows, int64_t dim, int8_t* to) {
        for (int64_t r = 0; r < rows; ++r) {
            int8_t* block = to + r / ROWS * block_numbers(dim);
            const Row row = row_of(query + r * dim, dim);
            std::memcpy(block + r % ROWS * 4, &row.unit, 4);
            int8_t* column = block + 64 + (r % ROWS / 4 * 8 + r % 4) * 4;
            for (int64_t i = 0; i < dim; i += 16) {
                int32_t digits[2][4];
                row.split(query + r * dim + i, digits[0], digits[1]);
                for (int64_t four = 0; four < 4; ++four)
                    for (int64_t digit = 0; digit < 2; ++digit) std::memcpy(column + (i / 4 + four) * 64 + digit * 16, &digits[digit][four], 4);
            }
        }
    }

    static size_t scratch_bytes(int64_t rows, int64_t) {
        const int64_t sums_of_logits = twofold::TILE * SIDE * 4, woven = BLOCKS * 4 * PIECE, weights = BLOCKS * blocks(rows) * PIECE, units = blocks(rows) * ROWS * 4;
        return static_cast<size_t>(sums_of_logits + woven + weights + units);
    }

    // A code that has turned is none: it is a number of bfloat16.
    static int64_t packed_turned_numbers(int64_t rows, int64_t dim) { return TileProducts::packed_numbers(rows, dim); }
    template <class Make>
    static void pack_turned(int64_t rows, int64_t wide, Make make, uint16_t* to) {
        TileProducts::pack_turned(rows, wide, make, to);
    }

    // out[row * TILE + key] += query[row] . key
    static void logits(const TwoFactors<int8_t, uint16_t>& factors, int64_t rows, int64_t count, float* out, char* scratch, Ahead& ahead) {
        if (factors.still.dim) add_products(factors.still, rows, count, out, scratch, ahead);
        if (factors.turned.dim) TileProducts::logits({{}, factors.turned}, rows, count, out, scratch, ahead);
    }

    static void add_products(const Factors<int8_t>& factor, int64_t rows, int64_t count, float* out, char* scratch, Ahead& ahead) {
        auto [query, keys, dim, stride] = factor;
        int32_t* found = reinterpret_cast<int32_t*>(scratch);  // [TILE, 16]
        for (int64_t first = 0; first < rows; first += ROWS, query += block_numbers(dim)) {
            int64_t key = 0;
            for (; key + 64 <= count; key += 64) products<4>(query + 64, dim, keys + key * stride, stride, found + key * SIDE, ahead);
            for (; key < count; key += 16) products<1>(query + 64, dim, keys + key * stride, stride, found + key * SIDE, ahead);
            const int64_t in_block = rows - first < ROWS ? rows - first : ROWS;
            for (int64_t r = 0; r < in_block; r += 4)
                for (key = 0; key < count; key += 16) {
                    add_logits(found + key * SIDE + 2 * r, reinterpret_cast<const float*>(query) + r, in_block - r, out + (first + r) * twofold::TILE + key);
                    ahead.go(25);
                }
        }
    }

    // out[row * out_stride + i] += weights[row * TILE + key] * values[key][i]; 64 columns at a time.
    static void sums(const float* weights, int64_t rows, int64_t dim, const int8_t* values, int64_t stride, int64_t count, float* out, int64_t out_stride, char* scratch, Ahead& ahead) {
        int8_t* woven = reinterpret_cast<int8_t*>(scratch) + twofold::TILE * SIDE * 4;  // [keys / 64, 4, 16 times four keys, 16 dimensions, 4]
        int8_t* left = woven + BLOCKS * 4 * PIECE;                                     // [blocks of 8 rows, keys / 64, 16, 64]: the high digits of the rows, and the low ones
        float* units = reinterpret_cast<float*>(left + BLOCKS * blocks(rows) * PIECE);
        const int64_t full = up(count, 64);
        for (int64_t r = 0; r < rows; ++r) {
            const float* from = weights + r * twofold::TILE;
            const Row row = row_of(from, full);
            int8_t* to = left + r / ROWS * BLOCKS * PIECE + r % ROWS * 64;
            units[r] = row.unit;
            for (int64_t key = 0; key < full; key += 16) {
                int8_t* place = to + key / 64 * PIECE + key % 64;
                row.split(from + key, place, place + ROWS * 64);
            }
            ahead.go(full * 3 / 8);
        }
        for (int64_t i = 0; i < dim; i += 64) {
            for (int64_t key = 0; key < count; key += 64) weave(values + key * stride + i, stride, count - key < 64 ? count - key : 64, woven + key / 64 * 4 * PIECE, ahead);
            for (int64_t first = 0; first < rows; first += ROWS)
                add_columns(left + first / ROWS * BLOCKS * PIECE, woven, full / 64, units + first, rows - first, out + first * out_stride + i, out_stride);
            ahead.go(128 + 30 * rows);
        }
    }

   private:
    // How a row becomes digits.
    struct Row {
        float unit, factor;

        // 16 numbers, into as many bytes of each digit. What is no number has the digits 0: its unit tells.
        void split(const float* from, void* high, void* low) const {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from), _mm512_set1_ps(factor)));
            _mm_storeu_si128(static_cast<__m128i*>(low), _mm512_cvtepi32_epi8(whole));
            _mm_storeu_si128(static_cast<__m128i*>(high), _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8)));
        }
    };

    // Magnitudes are compared as integers, for which infinity and NaN are the greatest.
    static Row row_of(const float* from, int64_t count) {
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = 0; i < count; i += 16) most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(from + i), _mm512_set1_epi32(0x7fffffff)));
        const int32_t greatest = _mm512_reduce_max_epi32(most);
        float magnitude;
        std::memcpy(&magnitude, &greatest, 4);
        constexpr float LARGEST = 127 * 256 + 127, SMALLEST = __FLT_MIN__;
        const float unit = magnitude / LARGEST < SMALLEST ? SMALLEST : magnitude / LARGEST;
        return {unit, 1.0f / unit};
    }

    static Floats combined(__m512i high, __m512i low) {
        return __builtin_convertvector(reinterpret_cast<Ints>(high), Floats) * 256.0f + __builtin_convertvector(reinterpret_cast<Ints>(low), Floats);
    }
    static void add(float* to, Floats found, float unit) { store(to, load(to) + found * unit); }

    // Once or four times 16 keys, and 8 queries in 16 columns.
    template <int Blocks>
    static void products(const int8_t* query, int64_t dim, const int8_t* keys, int64_t stride, int32_t* found, Ahead& ahead) {
        const int64_t step = SIDE * stride;
        _tile_zero(0);
        if constexpr (Blocks == 4) _tile_zero(1);
        if constexpr (Blocks == 4) _tile_zero(2);
        if constexpr (Blocks == 4) _tile_zero(3);
        for (int64_t i = 0; i < dim; i += 64) {
            _tile_loadd(6, query + i * SIDE, 64);
            _tile_loadd(4, keys + i, stride);
            _tile_dpbssd(0, 4, 6);
            if constexpr (Blocks == 4) {
                _tile_loadd(5, keys + step + i, stride);
                _tile_dpbssd(1, 5, 6);
                _tile_loadd(4, keys + 2 * step + i, stride);
                _tile_dpbssd(2, 4, 6);
                _tile_loadd(5, keys + 3 * step + i, stride);
                _tile_dpbssd(3, 5, 6);
            }
            ahead.go(20 * Blocks);
        }
        _tile_stored(0, found, 64);
        if constexpr (Blocks == 4) _tile_stored(1, found + SIDE * SIDE, 64);
        if constexpr (Blocks == 4) _tile_stored(2, found + 2 * SIDE * SIDE, 64);
        if constexpr (Blocks == 4) _tile_stored(3, found + 3 * SIDE * SIDE, 64);
    }

    // Up to four queries and 16 keys.
    static void add_logits(const int32_t* found, const float* units, int64_t rows, float* out) {
        Floats x[4];
        for (int64_t j = 0; j < 4; ++j) x[j] = combined(four_columns(found, j), four_columns(found + 4, j));
        turn_four(x);
        for (int64_t r = 0; r < 4 && r < rows; ++r) add(out + r * twofold::TILE, x[r], units[r]);
    }

    // Four rows of 64 numbers become right sides: tile j has the dimensions 4 j to 4 j + 3 of each 16. Rows of tiles beyond `count` keep what they hold: it has no weight.
    static void weave(const int8_t* values, int64_t stride, int64_t count, int8_t* to, Ahead& ahead) {
        for (int64_t key = 0; key < count; key += 4, to += 64) {
            const auto row = [&](int64_t k) { return _mm512_loadu_si512(values + (key + k) * stride); };
            const __m512i a = row(0), b = row(1), c = row(2), d = row(3);
            const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d), more_ab = _mm512_unpackhi_epi8(a, b), more_cd = _mm512_unpackhi_epi8(c, d);
            _mm512_storeu_si512(to, _mm512_unpacklo_epi16(ab, cd));
            _mm512_storeu_si512(to + PIECE, _mm512_unpackhi_epi16(ab, cd));
            _mm512_storeu_si512(to + 2 * PIECE, _mm512_unpacklo_epi16(more_ab, more_cd));
            _mm512_storeu_si512(to + 3 * PIECE, _mm512_unpackhi_epi16(more_ab, more_cd));
            ahead.go(10);
        }
    }

    // 8 rows of weights and 64 dimensions, of `blocks` times 64 keys.
    static void add_columns(const int8_t* left, const int8_t* woven, int64_t blocks, const float* units, int64_t rows, float* out, int64_t out_stride) {
        alignas(64) int32_t whole[4][SIDE][SIDE];
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t block = 0; block < blocks; ++block, left += PIECE, woven += 4 * PIECE) {
            _tile_loadd(4, left, 64);
            _tile_loadd(6, woven, 64);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, woven + PIECE, 64);
            _tile_dpbssd(1, 4, 7);
            _tile_loadd(6, woven + 2 * PIECE, 64);
            _tile_dpbssd(2, 4, 6);
            _tile_loadd(7, woven + 3 * PIECE, 64);
            _tile_dpbssd(3, 4, 7);
        }
        _tile_stored(0, whole[0], 64);
        _tile_stored(1, whole[1], 64);
        _tile_stored(2, whole[2], 64);
        _tile_stored(3, whole[3], 64);
        for (int64_t r = 0; r < rows && r < ROWS; ++r) {
            Floats x[4];
            for (int64_t j = 0; j < 4; ++j) x[j] = combined(_mm512_load_si512(whole[j][r]), _mm512_load_si512(whole[j][ROWS + r]));
            turn_lanes(x);
            for (int64_t j = 0; j < 4; ++j) add(out + r * out_stride + 16 * j, x[j], units[r]);
        }
    }
};

}  // namespace
