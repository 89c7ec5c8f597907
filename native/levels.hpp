// The ways to compute, from the slowest to the fastest, and which of them this processor knows.
#pragma once

#include <string>
#include <vector>

#include "call.hpp"

namespace twofold {

extern const Level PLAIN, AVX2, AVX512, AVX512_BF16, AMX_BF16;

// Those that this processor can carry out; the first always, the last the fastest.
const std::vector<const Level*>& levels();

// The fastest of at most `name` for queries of bfloat16 over keys of bfloat16 or codes, or for any other; empty: the fastest that there is.
// Throws std::invalid_argument for a level that is unknown or that this processor does not know.
const Level& level_for(bool is_bfloat16, const std::string& name);

}  // namespace twofold
