// AMX: products of whole tiles of bfloat16.
#define TWOFOLD_WIDTH 16
#include "../bfloat16_products.hpp"
#include "../levels.hpp"
#include "../tile.hpp"

namespace twofold {
extern const Level AMX_BF16{"amx_bf16", scratch_bytes<TileProducts>, attend<TileProducts>};
}
