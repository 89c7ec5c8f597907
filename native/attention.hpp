// Attention of a few queries over many keys: the keys are split into chunks, each chunk is one piece of work, and what they found is put together.
#pragma once

#include "call.hpp"

namespace twofold {

// Fills call.output. The result does not depend on the number of threads.
void attention(const Call& call, const Level& level, int threads);

}  // namespace twofold
