#include "levels.hpp"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace twofold {

namespace {

#if defined(__x86_64__)
bool knows(unsigned leaf, unsigned part, int which_register, unsigned bit) {
    unsigned registers[4] = {};
    if (!__get_cpuid_count(leaf, part, &registers[0], &registers[1], &registers[2], &registers[3])) return false;
    return registers[which_register] >> bit & 1;
}

// A process must ask Linux for the registers of tiles, once; its threads have them then.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr int ASK = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ASK, TILES) == 0;
#else
    return false;
#endif
}
#endif

std::vector<const Level*> found_levels() {
    std::vector<const Level*> found{&PLAIN};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && knows(1, 0, 2, 29))) return found;
    found.push_back(&AVX2);
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))) return found;
    found.push_back(&AVX512);
    if (!knows(7, 1, 0, 5)) return found;
    found.push_back(&AVX512_BF16);
    if (knows(7, 0, 3, 22) && knows(7, 0, 3, 24) && knows(7, 0, 3, 25) && may_use_tiles()) found.push_back(&AMX_BF16);
#endif
    return found;
}

#if defined(__x86_64__)
bool is_of_bfloat16(const Level* level) { return level == &AVX512_BF16 || level == &AMX_BF16; }
#else
bool is_of_bfloat16(const Level*) { return false; }
#endif

}  // namespace

const std::vector<const Level*>& levels() {
    static const std::vector<const Level*> found = found_levels();
    return found;
}

const Level& level_for(bool is_bfloat16, const std::string& name) {
    const Level* best = nullptr;
    bool is_known = name.empty();
    for (const Level* level : levels()) {
        if (is_bfloat16 || !is_of_bfloat16(level)) best = level;
        if (name == level->name) {
            is_known = true;
            break;
        }
    }
    if (!is_known) {
        std::string known;
        for (const Level* level : levels()) known += std::string(known.empty() ? "" : ", ") + level->name;
        throw std::invalid_argument("This processor has no level " + name + ": use one of " + known + ".");
    }
    return *best;
}

}  // namespace twofold
