#include <algorithm>

#include "heun.h"
#include "parallel.h"

namespace ttcfast {
namespace {

constexpr int64_t kChunk = 1 << 15;        // numbers per work item
constexpr int64_t kSerialBelow = 1 << 17;  // numbers below which waking a thread costs more than it saves

template <class T>
void typed(const HeunUpdate& u) {
    const auto run = at_level(u.level, [](auto level) { return &heun_run<T, level>; });
    const int64_t unit = std::max<int64_t>(u.group, 1);
    const int64_t chunk = std::max<int64_t>(kChunk / unit, 1) * unit;
    auto at = [](const void* base, int64_t offset) { return base ? static_cast<const T*>(base) + offset : nullptr; };
    parallel_for((u.count + chunk - 1) / chunk, u.count < kSerialBelow ? 1 : u.threads, [&](int64_t item, int) {
        const int64_t start = item * chunk, n = std::min(chunk, u.count - start);
        const HeunRun<T> part{at(u.base, start),      at(u.first, start),      at(u.second, start),
                              static_cast<T>(u.step), static_cast<T>(u.ratio), static_cast<T*>(u.out) + start};
        run(part, n, u.group);
    });
}

}  // namespace

void heun_cpu(const HeunUpdate& update) {
    with_type<float, double>(update.dtype, [&](auto zero) { typed<decltype(zero)>(update); });
}

}  // namespace ttcfast
