#include <algorithm>

#include "clones.h"
#include "heun.h"
#include "parallel.h"

namespace ttcfast {
namespace {

constexpr int64_t kChunk = 1 << 15;        // numbers per work item
constexpr int64_t kSerialBelow = 1 << 17;  // numbers under which starting a thread costs more than it saves

template <class T>
struct Run {
    const T *base, *first, *second;
    T step, ratio;
    T* out;
};

template <class T>
TTCFAST_INLINE T slope(const Run<T>& r, int64_t i) {
    return r.second ? r.first[i] + r.ratio * r.second[i] : r.first[i];
}

template <class T>
TTCFAST_INLINE void plain(const Run<T>& r, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const T change = r.step * slope(r, i);
        r.out[i] = r.base ? r.base[i] + change : change;
    }
}

template <class T>
TTCFAST_INLINE void centered(const Run<T>& r, int64_t n, int64_t group) {
    for (int64_t start = 0; start < n; start += group) {
        T sum = 0;
        for (int64_t i = start; i < start + group; ++i) sum += slope(r, i);
        const T mean = sum / static_cast<T>(group);
        for (int64_t i = start; i < start + group; ++i) {
            const T change = r.step * (slope(r, i) - mean);
            r.out[i] = r.base ? r.base[i] + change : change;
        }
    }
}

// Groups of SimNorm's usual size, in steps of which each is one vector operation.
template <bool has_base, bool has_second, class T>
TTCFAST_INLINE void centered_by_eight(const T* base, const T* first, const T* second, T step, T ratio, int64_t n, T* out) {
    for (int64_t start = 0; start < n; start += 8) {
        T v[8], half[8], quarter[8], total[8];
        for (int i = 0; i < 8; ++i) v[i] = has_second ? first[start + i] + ratio * second[start + i] : first[start + i];
        for (int i = 0; i < 8; ++i) half[i] = v[i] + v[i ^ 4];
        for (int i = 0; i < 8; ++i) quarter[i] = half[i] + half[i ^ 2];
        for (int i = 0; i < 8; ++i) total[i] = quarter[i] + quarter[i ^ 1];
        for (int i = 0; i < 8; ++i) v[i] = step * (v[i] - total[i] * T(0.125));
        for (int i = 0; i < 8; ++i) out[start + i] = has_base ? base[start + i] + v[i] : v[i];
    }
}

template <class T>
TTCFAST_INLINE void centered_by_eight(const Run<T>& r, int64_t n) {
    if (r.base && r.second) return centered_by_eight<true, true>(r.base, r.first, r.second, r.step, r.ratio, n, r.out);
    if (r.base) return centered_by_eight<true, false>(r.base, r.first, r.second, r.step, r.ratio, n, r.out);
    if (r.second) return centered_by_eight<false, true>(r.base, r.first, r.second, r.step, r.ratio, n, r.out);
    centered_by_eight<false, false>(r.base, r.first, r.second, r.step, r.ratio, n, r.out);
}

template <class T>
TTCFAST_INLINE void update(const Run<T>& r, int64_t n, int64_t group) {
    if (group == 0) return plain(r, n);
    if (group == 8) return centered_by_eight(r, n);
    centered(r, n, group);
}

TTCFAST_CLONES void update_float(const Run<float>& r, int64_t n, int64_t group) { update(r, n, group); }
TTCFAST_CLONES void update_double(const Run<double>& r, int64_t n, int64_t group) { update(r, n, group); }

inline void run(const Run<float>& r, int64_t n, int64_t group) { update_float(r, n, group); }
inline void run(const Run<double>& r, int64_t n, int64_t group) { update_double(r, n, group); }

template <class T>
void typed(const HeunUpdate& u) {
    const int64_t unit = std::max<int64_t>(u.group, 1);
    const int64_t chunk = std::max<int64_t>(kChunk / unit, 1) * unit;
    auto at = [](const void* base, int64_t offset) { return base ? static_cast<const T*>(base) + offset : nullptr; };
    parallel_for((u.count + chunk - 1) / chunk, u.count < kSerialBelow ? 1 : u.threads, [&](int64_t item, int) {
        const int64_t start = item * chunk, n = std::min(chunk, u.count - start);
        const Run<T> part{at(u.base, start),      at(u.first, start),      at(u.second, start),
                          static_cast<T>(u.step), static_cast<T>(u.ratio), static_cast<T*>(u.out) + start};
        run(part, n, u.group);
    });
}

}  // namespace

void heun_cpu(const HeunUpdate& update) { update.wide ? typed<double>(update) : typed<float>(update); }

}  // namespace ttcfast
