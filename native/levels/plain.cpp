// Any processor that GCC or Clang compile for: four floats a vector (SSE2 on x86-64, NEON on Arm).
#define TWOFOLD_WIDTH 4
#include "../float_products.hpp"
#include "../levels.hpp"
#include "../tile.hpp"

namespace twofold {
extern const Level PLAIN{"plain", scratch_bytes<FloatProducts>, attend<FloatProducts>};
}
