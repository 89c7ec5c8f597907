// AMX: products of whole tiles of bfloat16, and of codes where all is codes.
#define TWOFOLD_WIDTH 16
#include "../bfloat16_products.hpp"
#include "../code_products.hpp"
#include "../levels.hpp"
#include "../tile.hpp"

namespace {

size_t tile_scratch_bytes(const Call& call) { return CodeProducts::serves(call) ? scratch_bytes<CodeProducts>(call) : scratch_bytes<TileProducts>(call); }

void tile_attend(const Call& call, int64_t sequence, int64_t kv_head, int64_t first, int64_t last, char* scratch, Part part) {
    const auto by = CodeProducts::serves(call) ? attend<CodeProducts> : attend<TileProducts>;
    by(call, sequence, kv_head, first, last, scratch, part);
}

}  // namespace

namespace twofold {
extern const Level AMX_BF16{"amx_bf16", tile_scratch_bytes, tile_attend};
}
