// The updates of heun.h, compiled once per instruction set (level.h).
#include "heun.h"

namespace ttcfast {
namespace {

template <bool has_second, class T>
TTCFAST_INLINE T slope(const HeunRun<T>& r, int64_t i) {
    return has_second ? r.first[i] + r.ratio * r.second[i] : r.first[i];
}

template <bool has_base, bool has_second, class T>
void plain(const HeunRun<T>& r, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const T change = r.step * slope<has_second>(r, i);
        r.out[i] = has_base ? r.base[i] + change : change;
    }
}

template <bool has_base, bool has_second, class T, class Group>
void centered(const HeunRun<T>& r, int64_t n, Group group) {
    for (int64_t start = 0; start < n; start += group) {
        T sum = 0;
        for (int64_t i = start; i < start + group; ++i) sum += slope<has_second>(r, i);
        const T mean = sum / static_cast<T>(group);
        for (int64_t i = start; i < start + group; ++i) {
            const T change = r.step * (slope<has_second>(r, i) - mean);
            r.out[i] = has_base ? r.base[i] + change : change;
        }
    }
}

// Groups of SimNorm's usual size, processed with one vector operation per step.
template <bool has_base, bool has_second, class T>
void centered_by_eight(const HeunRun<T>& r, int64_t n) {
    const T *base = r.base, *first = r.first, *second = r.second;
    const T step = r.step, ratio = r.ratio;
    T* out = r.out;
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

template <bool has_base, bool has_second, class T>
void update(const HeunRun<T>& r, int64_t n, int64_t group) {
    if (group == 0) return plain<has_base, has_second>(r, n);
    if (group == 8) return centered_by_eight<has_base, has_second>(r, n);
    if (group == 4) return centered<has_base, has_second>(r, n, std::integral_constant<int64_t, 4>());  // unrolled
    centered<has_base, has_second>(r, n, group);
}

}  // namespace

template <class T, Level level>
void heun_run(const HeunRun<T>& r, int64_t n, int64_t group) {
    if (r.base) return r.second ? update<true, true>(r, n, group) : update<true, false>(r, n, group);
    r.second ? update<false, true>(r, n, group) : update<false, false>(r, n, group);
}

template void heun_run<float, kLevel>(const HeunRun<float>&, int64_t, int64_t);
template void heun_run<double, kLevel>(const HeunRun<double>&, int64_t, int64_t);

}  // namespace ttcfast
