// AVX-512 with products of bfloat16.
#define TWOFOLD_WIDTH 16
#include "../bfloat16_products.hpp"
#include "../levels.hpp"
#include "../tile.hpp"

namespace twofold {
extern const Level AVX512_BF16{"avx512_bf16", scratch_bytes<DotProducts>, attend<DotProducts>};
}
