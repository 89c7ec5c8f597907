// AVX2 with FMA and F16C: eight floats a vector.
#define TWOFOLD_WIDTH 8
#include "../float_products.hpp"
#include "../levels.hpp"
#include "../tile.hpp"

namespace twofold {
extern const Level AVX2{"avx2", scratch_bytes<FloatProducts>, attend<FloatProducts>};
}
