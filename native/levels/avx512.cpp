// AVX-512: sixteen floats a vector.
#define TWOFOLD_WIDTH 16
#include "../float_products.hpp"
#include "../levels.hpp"
#include "../tile.hpp"

namespace twofold {
extern const Level AVX512{"avx512", scratch_bytes<FloatProducts>, attend<FloatProducts>};
}
