// topk of csrc/topk_cpu.cpp with ids, by a program of its own that tests/ops/test_topk_sanitized.py builds with AddressSanitizer. Rows
// so short that all scores are candidates, which are then cut to k: in most of them the k-th largest is the last one in its bin.
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "../../csrc/topk.h"

int main() {
    std::mt19937_64 random(1);
    for (const int64_t n : {31, 100, 200, 256}) {
        for (const int64_t k : {2, 3, 5, 11, 15}) {
            std::vector<float> scores(n), values(k);
            std::vector<int64_t> ids(n), indices(k);
            for (float& x : scores) x = std::normal_distribution<float>()(random);
            std::iota(ids.begin(), ids.end(), -n / 2);
            ttcfast::TopkProblem problem{};
            problem.dtype = ttcfast::DType::float32;
            problem.rows = problem.row_stride = problem.id_row_stride = 1;
            problem.columns = n;
            problem.k = k;
            problem.column_stride = problem.id_column_stride = 1;
            problem.scores = scores.data();
            problem.ids = ids.data();
            problem.values = values.data();
            problem.indices = indices.data();
            ttcfast::topk_cpu(problem, 1, ttcfast::Level::generic);
            for (int64_t i = 0; i < k; ++i) {
                if (scores[indices[i] + n / 2] != values[i] || (i > 0 && values[i] > values[i - 1])) {
                    std::printf("n %lld, k %lld: place %lld is wrong\n", (long long)n, (long long)k, (long long)i);
                    return 1;
                }
            }
        }
    }
    return 0;
}
