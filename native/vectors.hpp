// Vectors of TWOFOLD_WIDTH floats, said in the words of GCC and Clang that every processor understands; each level includes this with its own width.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if TWOFOLD_WIDTH > 4
#include <immintrin.h>
#endif

namespace {

constexpr int W = TWOFOLD_WIDTH;
using Floats = float __attribute__((vector_size(4 * W)));
using Ints = int32_t __attribute__((vector_size(4 * W)));
using Shorts = uint16_t __attribute__((vector_size(2 * W)));
using Bytes = int8_t __attribute__((vector_size(W)));

inline Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
// The first `count` of them; 0 in the other lanes.
inline Floats load(const float* p, int64_t count) {
    if (count >= W) return load(p);
    Floats x = {};
    std::memcpy(&x, p, static_cast<size_t>(count) * 4);
    return x;
}
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline Floats all(float x) { return Floats{} + x; }
inline Ints bits(Floats x) {
    Ints i;
    std::memcpy(&i, &x, sizeof i);
    return i;
}
inline Floats floats(Ints i) {
    Floats x;
    std::memcpy(&x, &i, sizeof x);
    return x;
}
// A NaN in x is kept.
inline Floats greater(Floats x, Floats y) { return x < y ? y : x; }

// x and x moved by `Half` lanes, of which the first are combined; then by half as many, until one lane is left.
template <int Half = W / 2, class Combine, int... Lane>
inline float reduce(Floats x, Combine combine, std::integer_sequence<int, Lane...> lanes) {
    const Floats both = combine(x, __builtin_shufflevector(x, x, ((Lane + Half) % W)...));
    if constexpr (Half == 1)
        return both[0];
    else
        return reduce<Half / 2>(both, combine, lanes);
}
inline float sum(Floats x) {
    return reduce(x, [](Floats a, Floats b) { return a + b; }, std::make_integer_sequence<int, W>{});
}
inline float greatest(Floats x) { return reduce(x, greater, std::make_integer_sequence<int, W>{}); }

// e^x within two units of the last place; 0 below -87.3, NaN for NaN. Source: the polynomial of Cephes' expf (Moshier), as everybody has it.
inline Floats power_series(Floats r) {
    Floats y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    return y * r * r + r + 1.0f;
}

#if TWOFOLD_WIDTH == 16
inline Floats exp(Floats x) {
    const __mmask16 is_any = _mm512_cmp_ps_mask(x, all(-87.33654f), _CMP_NLT_UQ);
    const Floats n = _mm512_roundscale_ps(x * 1.44269504088896341f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_maskz_scalef_ps(is_any, power_series((x - n * 0.693359375f) + n * 2.12194440e-4f), n);
}
#else
inline Floats exp(Floats x) {
    const Floats clamped = greater(x < 88.0f ? x : all(88.0f), all(-87.33654f));
    const Floats rounded = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum has no fraction
    const Floats n = rounded - 12582912.0f;
    const Floats y = power_series((clamped - n * 0.693359375f) + n * 2.12194440e-4f);
    const Ints power = (bits(rounded) - 0x4b400000 + 127) << 23;
    const Floats result = y * floats(power);
    return x != x ? x : (x < -87.33654f ? all(0.0f) : result);
}
#endif

// tanh x within a few units of the last place. Source: the rational function of Eigen's ptanh.
inline Floats tanh(Floats x) {
    const Floats clamped = greater(x < 7.90531110763549805f ? x : all(7.90531110763549805f), all(-7.90531110763549805f));
    const Floats s = clamped * clamped;
    Floats p = all(-2.76076847742355e-16f);
    p = p * s + 2.00018790482477e-13f;
    p = p * s + -8.60467152213735e-11f;
    p = p * s + 5.12229709037114e-08f;
    p = p * s + 1.48572235717979e-05f;
    p = p * s + 6.37261928875436e-04f;
    p = p * s + 4.89352455891786e-03f;
    Floats q = all(1.19825839466702e-06f);
    q = q * s + 1.18534705686654e-04f;
    q = q * s + 2.26843463243900e-03f;
    q = q * s + 4.89352518554385e-03f;
    const Floats result = clamped * p / q;
    return x != x ? x : result;
}

// Asks for the line of memory at p, which will be wanted soon. Where that is no memory of ours nothing happens.
inline void ask_soon(const void* p) { __builtin_prefetch(p, 0, 2); }

// Lines of the next tile, asked for a few at a time in between other work. A core waits for few lines at once: while they are many it can hardly read what lies in the
// second level of its caches. So lines are spread over the work, by what the tile before took.
class Ahead {
   public:
    // `places` of `lines` lines in a tile, in the order in which they are to be asked for.
    Ahead() = default;
    Ahead(const int32_t* places, int64_t lines) : places_(places), lines_(lines), next_(lines), lines_of_cycle_((1 << SHIFT) / 8) {}

    void begin(const char* tile) { tile_ = tile, next_ = 0, cycles_ = 0; }

    // Work was done that took about so many cycles.
    void go(int64_t cycles) {
        cycles_ += cycles;
        ask_until(cycles_ * lines_of_cycle_ >> SHIFT);
    }

    // The tile before it is done with.
    void end() {
        ask_until(lines_);
        if (cycles_) lines_of_cycle_ = (lines_ << SHIFT) / cycles_ + 1;
    }

   private:
    static constexpr int SHIFT = 16;

    void ask_until(int64_t line) {
        const int64_t last = line < lines_ ? line : lines_;
        for (; next_ < last; ++next_) ask_soon(tile_ + places_[next_]);
    }

    const char* tile_ = nullptr;
    const int32_t* places_ = nullptr;
    int64_t lines_ = 0, next_ = 0, cycles_ = 0, lines_of_cycle_ = 0;
};

// W numbers as they are stored, as floats; the words that all processors understand say it too, but GCC 12 makes slow code of them.
struct Half {
    uint16_t bits;
};

inline Floats widen(const float* p) { return load(p); }

#if TWOFOLD_WIDTH == 16
inline Floats widen(const uint16_t* p) {  // bfloat16
    return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline Floats widen(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline Floats widen(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
#elif TWOFOLD_WIDTH == 8
inline Floats widen(const uint16_t* p) {
    return reinterpret_cast<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline Floats widen(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
inline Floats widen(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
#else
inline Floats widen(const uint16_t* p) {
    Shorts x;
    std::memcpy(&x, p, sizeof x);
    return floats(__builtin_convertvector(x, Ints) << 16);
}
inline Floats widen(const int8_t* p) {
    Bytes x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, Floats);
}
inline Floats widen(const Half* p) {
    // Exponent and fraction moved to their places; 2^112 sets the exponent's bias right, for subnormal numbers too; infinity and NaN by themselves.
    Shorts x;
    std::memcpy(&x, p, sizeof x);
    const Ints h = __builtin_convertvector(x, Ints);
    const Ints magnitude = (h & 0x7fff) << 13;
    const Floats scaled = floats(magnitude) * 5.192296858534828e33f;
    const Ints special = (magnitude >= (0x7c00 << 13)) & 0x7f800000;
    return floats(bits(scaled) | special | ((h & 0x8000) << 16));
}
#endif

// The lanes of v[i] and v[i + 1] that lie `Stride` apart, added: those of v[i] in the lanes without the bit `Stride`, those of v[i + 1] in the others.
template <int Stride, int... Lane>
inline Floats folded(Floats a, Floats b, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(a, b, ((Lane & Stride) ? W : 0) + (Lane & ~Stride)...) +
           __builtin_shufflevector(a, b, ((Lane & Stride) ? W : 0) + (Lane & ~Stride) + Stride...);
}

// Sums of W vectors in one, v[0]: its lane i is the sum of v[i].
template <int Stride = 1>
inline void merge(Floats* v) {
    if constexpr (Stride < W) {
        for (int i = 0; i < W / Stride; i += 2) v[i / 2] = folded<Stride>(v[i], v[i + 1], std::make_integer_sequence<int, W>{});
        merge<2 * Stride>(v);
    }
}

}  // namespace
