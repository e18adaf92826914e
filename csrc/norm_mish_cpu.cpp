#include <algorithm>
#include <vector>

#include "norm_mish.h"
#include "parallel.h"

namespace ttcfast {
namespace {

constexpr int64_t kBlock = 32;             // rows per work item; sums over rows are per block, so results do not depend on threads
constexpr int64_t kSerialBelow = 1 << 16;  // numbers below which waking a thread costs more than it saves

// Calls work(block, number) for blocks of rows, each with a buffer of its worker for `rows_of_work` rows.
template <class T, class Work>
void for_blocks(const NormMish& p, int64_t rows_of_work, const Work& work) {
    const int64_t blocks = (p.count + kBlock - 1) / kBlock;
    const int threads = p.count * p.width < kSerialBelow ? 1 : static_cast<int>(std::clamp<int64_t>(blocks, 1, std::max(p.threads, 1)));
    std::vector<T> room(static_cast<size_t>(threads * rows_of_work * p.width));
    const NormMishLayer<T> layer{p.width, static_cast<const T*>(p.bias), static_cast<const T*>(p.scale), static_cast<const T*>(p.shift),
                                 static_cast<T>(p.eps)};
    parallel_for(blocks, threads, [&](int64_t number, int worker) {
        const int64_t first = number * kBlock, at = first * p.width;
        NormMishBlock<T> block{};
        block.layer = layer;
        block.count = std::min(kBlock, p.count - first);
        block.x = static_cast<const T*>(p.x) + at;
        block.rows = p.rows ? static_cast<const T*>(p.rows) + at : nullptr;
        block.work = room.data() + worker * rows_of_work * p.width;
        work(block, number);
    });
}

template <class T>
void forward_typed(const NormMish& p, T* y, T* stats) {
    const auto forward = at_level(p.level, [](auto level) { return &norm_mish_rows<T, level>; });
    for_blocks<T>(p, 1, [&](NormMishBlock<T>& block, int64_t number) {
        block.y = y + number * kBlock * p.width;
        block.stats = stats + number * kBlock * 2;
        forward(block);
    });
}

template <class T>
void backward_typed(const NormMish& p, const T* grad, const T* stats, T* grad_x, T* y, T* grad_scale, T* grad_shift) {
    const auto backward = at_level(p.level, [](auto level) { return &norm_mish_rows_backward<T, level>; });
    const int64_t blocks = (p.count + kBlock - 1) / kBlock;
    std::vector<T> parameters(grad_scale ? static_cast<size_t>(blocks * 2 * p.width) : 0);
    for_blocks<T>(p, 2, [&](NormMishBlock<T>& block, int64_t number) {
        const int64_t at = number * kBlock * p.width;
        block.grad = grad + at;
        block.stats = const_cast<T*>(stats) + number * kBlock * 2;
        block.grad_x = grad_x + at;
        block.y = y ? y + at : nullptr;
        block.parameters = grad_scale ? parameters.data() + number * 2 * p.width : nullptr;
        backward(block);
    });
    if (!grad_scale) return;
    std::fill(grad_scale, grad_scale + p.width, T(0));
    std::fill(grad_shift, grad_shift + p.width, T(0));
    for (int64_t number = 0; number < blocks; ++number) {
        const T* part = parameters.data() + number * 2 * p.width;
        for (int64_t i = 0; i < p.width; ++i) grad_scale[i] += part[i];
        for (int64_t i = 0; i < p.width; ++i) grad_shift[i] += part[p.width + i];
    }
}

}  // namespace

void norm_mish_cpu(const NormMish& p, void* y, void* stats) {
    with_type<float, double>(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        forward_typed(p, static_cast<T*>(y), static_cast<T*>(stats));
    });
}

void norm_mish_backward_cpu(const NormMish& p, const void* grad, const void* stats, void* grad_x, void* y, void* grad_scale,
                            void* grad_shift) {
    with_type<float, double>(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        backward_typed(p, static_cast<const T*>(grad), static_cast<const T*>(stats), static_cast<T*>(grad_x), static_cast<T*>(y),
                       static_cast<T*>(grad_scale), static_cast<T*>(grad_shift));
    });
}

}  // namespace ttcfast
