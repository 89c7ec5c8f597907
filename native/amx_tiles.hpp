// Registers of tiles, which products of bfloat16 and of codes both use: 0 to 3 sums, 4 and 5 the left sides, 6 and 7 the right sides; 16 rows of 64 bytes each.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "vectors.hpp"

namespace {

struct Tiles {
    static constexpr int64_t SIDE = 16;  // rows of a tile, and columns of one of sums

    static void start() {
        struct alignas(64) {
            uint8_t palette = 1, first_row = 0, unused[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        _tile_loadconfig(&shape);
    }
    static void stop() { _tile_release(); }

    // Four columns of 16 rows of a tile of sums; lane 4 l + i of `at[j]` is row 4 l + j, column i. A read from memory puts four lanes in place at no cost.
    template <class Number>
    static __m512i four_columns(const Number* sums, int64_t j) {
        const auto lane = [&](int64_t l) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(sums + (4 * l + j) * SIDE)); };
        __m512i found = _mm512_castsi128_si512(lane(0));
        found = _mm512_inserti32x4(found, lane(1), 1);
        found = _mm512_inserti32x4(found, lane(2), 2);
        return _mm512_inserti32x4(found, lane(3), 3);
    }

    // Four numbers of each of four vectors, in each of their four lanes of 128 bits: what was one vector's becomes one number of each vector.
    static void turn_four(Floats (&x)[4]) {
        const auto low = [](Floats a, Floats b) { return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29); };
        const auto high = [](Floats a, Floats b) { return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31); };
        const auto evens = [](Floats a, Floats b) { return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29); };
        const auto odds = [](Floats a, Floats b) { return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31); };
        const Floats a = low(x[0], x[1]), b = high(x[0], x[1]), c = low(x[2], x[3]), d = high(x[2], x[3]);
        x[0] = evens(a, c), x[1] = odds(a, c), x[2] = evens(b, d), x[3] = odds(b, d);
    }

    // Four columns of 16 rows of a tile, from vectors as `four_columns` makes them.
    static void put_columns(const Floats (&x)[4], float* to) {
        for (int64_t j = 0; j < 4; ++j) {
            const __m512 all = x[j];
            _mm_storeu_ps(to + j * SIDE, _mm512_castps512_ps128(all));
            _mm_storeu_ps(to + (4 + j) * SIDE, _mm512_extractf32x4_ps(all, 1));
            _mm_storeu_ps(to + (8 + j) * SIDE, _mm512_extractf32x4_ps(all, 2));
            _mm_storeu_ps(to + (12 + j) * SIDE, _mm512_extractf32x4_ps(all, 3));
        }
    }

    // The same of lanes: lane j of vector i becomes lane i of vector j.
    static void turn_lanes(Floats (&x)[4]) {
        const auto low = [](Floats a, Floats b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23); };
        const auto high = [](Floats a, Floats b) { return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31); };
        const auto evens = [](Floats a, Floats b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27); };
        const auto odds = [](Floats a, Floats b) { return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31); };
        const Floats a = low(x[0], x[1]), b = low(x[2], x[3]), c = high(x[0], x[1]), d = high(x[2], x[3]);
        x[0] = evens(a, b), x[1] = odds(a, b), x[2] = evens(c, d), x[3] = odds(c, d);
    }
};

}  // namespace
