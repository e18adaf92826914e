// topk on the CPU. If k is small compared to n, a row is read once for the maxima of short groups. The k-th largest maximum is a bound that
// at least k scores reach, and only blocks with a maximum above it are scanned again, in order, with a bound that rises as better scores
// are found. This works for any input: at most k - 1 groups exceed the bound, and ties beyond k are never taken. If k is large, the
// k-th largest key is found by histograms. Either way the survivors are radix sorted, which is stable.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "parallel.h"
#include "topk.h"
#include "topk_loop.h"
#include "topk_select.h"

namespace ttcfast {
namespace {

constexpr int64_t kSegment = 1 << 20;      // scores whose maxima are computed at a time: at most 4 MB, which fits the last-level cache
constexpr int64_t kGathered = 1 << 16;     // likewise for strided scores, which are copied first
constexpr int64_t kGroupsPerBest = 8;      // minimum maxima per selected score, so that hardly more than k scores reach the bound
constexpr int64_t kLeastReach = 8;         // scores per maximum below which histograms are faster
constexpr int64_t kSerialBelow = 1 << 17;  // scores below which waking a thread costs more than it saves
constexpr int64_t kPart = 1 << 21;         // scores of a single row that justify another thread
constexpr int64_t kRoom = 2048;            // minimum number of candidates before they are cut to k
constexpr int64_t kTakenWhole = 256;       // scores that all become candidates if histograms would cost more

// Scores per maximum for n scores: a power of two; below kLeastReach where k is too large for that.
int64_t reach_for(int64_t n, int64_t k) {
    int64_t reach = 1;
    while (reach < kMostReach && 2 * reach * kGroupsPerBest * k <= n) reach *= 2;
    return reach;
}

// Uninitialised memory.
template <class T>
std::unique_ptr<T[]> buffer(int64_t n) {
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(n)]);
}

// Selects the k best of the scores it is shown, in the order of their positions. The constructor allocates all memory: O(k), and maxima of
// one segment at a time, whatever the length of a row.
template <class T>
class Selector {
  public:
    using Key = typename Score<T>::Key;

    Selector(const TopkLoops<T>& loops, int64_t n, int64_t k, bool contiguous, bool named)
        : loops_(loops), k_(k), segment_(std::min(n, std::max(contiguous ? kSegment : kGathered, 2 * kMostReach * k))) {
        // Of at least kLeastReach scores each and, unless that is kMostReach, fewer than 2 kGroupsPerBest k; `select` takes fewer than
        // kGroupsPerBest kLeastReach k scores at once.
        const int64_t keys = std::min(segment_, std::max(segment_ / kMostReach, kLeastReach * kGroupsPerBest * k));
        const int64_t added = std::max(std::min(segment_, kMostBlock), named ? keys : 2 * k);
        const int64_t candidates = std::max(4 * k, kRoom) + added + 1;  // a scan writes one element beyond those it keeps
        maxima_ = buffer<Key>(keys);
        scratch_ = buffer<Key>(std::max(keys, candidates));
        best_ = buffer<Candidate<Key>>(candidates);
        other_ = buffer<Candidate<Key>>(2 * k);
        counts_ = buffer<int64_t>(static_cast<int64_t>(1) << kMostDigits);
        if (named) ties_ = buffer<int64_t>(candidates);
        if (!contiguous) gathered_ = buffer<T>(segment_);
    }

    void start_row(const RowIds& ids) {
        ids_ = ids;
        count_ = before_floor_ = 0;
        bound_ = floor_ = kBelowAll<Key>;
        last_tie_ = -1;
    }

    // Scores [first, last) of a row.
    void show(const T* row, int64_t stride, int64_t first, int64_t last) {
        for (int64_t start = first; start < last; start += segment_) {
            const int64_t n = std::min(segment_, last - start);
            const T* scores = row + start * stride;
            if (reach_for(n, k_) < kLeastReach && n > kTakenWhole) {
                select(scores, stride, n, start);
                continue;
            }
            for (int64_t i = 0; stride != 1 && i < n; ++i) gathered_[i] = scores[i * stride];
            filter(stride == 1 ? scores : gathered_.get(), n, start);
        }
        if (count_ > 2 * k_) cut();  // a small excess is sorted faster than it is found
    }

    // Merges the best of a selector that was shown later scores of the same row.
    void absorb(Selector& other) {
        other.cut();
        std::copy_n(other.best_.get(), other.count_, best_.get() + count_);
        count_ += other.count_;
        cut();
    }

    // Writes the k best, best first, to one row of the result.
    void write(const T* row, int64_t stride, T* values, int64_t* indices) {
        sort_by_key(best_.get(), count_, other_.get(), counts_.get());
        if (ids_) sort_ties(best_.get(), count_, ids_);
        const Candidate<Key>* const best = best_.get();
        const RowIds ids = ids_;
        for (int64_t i = 0, k = k_; i < k; ++i) {
            const int64_t position = best[i].position;
            values[i] = row[position * stride];
            indices[i] = ids ? ids[position] : position;
        }
    }

  private:
    void filter(const T* scores, int64_t n, int64_t position) {
        const int64_t reach = reach_for(n, k_), lanes = loops_.lanes, block = reach * lanes;
        const int64_t blocks = reach < kLeastReach ? 0 : n / block, groups = blocks * lanes;
        int64_t done = 0;
        if (groups > k_) {
            loops_.maxima(scores, blocks, reach, maxima_.get());
            raise_floor(kth_largest(maxima_.get(), groups, k_, k_ / 4, scratch_.get(), counts_.get(), loops_.extremes));
            int64_t at = -1;
            while ((at = loops_.next_block(maxima_.get(), at + 1, blocks, bound_)) < blocks) {
                take(scores + at * block, block, position + at * block);
            }
            done = blocks * block;
        }
        for (; done < n; done += kMostBlock) take(scores + done, std::min(kMostBlock, n - done), position + done);
    }

    // Selects in one pass, by (nearly) the k-th largest key of these scores alone.
    void select(const T* scores, int64_t stride, int64_t n, int64_t position) {
        const Key* const keys = maxima_.get();
        loops_.keys(scores, n, stride, maxima_.get());
        const int64_t wanted = std::min(k_, n), slack = wanted / 4;
        const Key least = kth_largest(keys, n, wanted, slack, scratch_.get(), counts_.get(), loops_.extremes);
        int64_t above = 0, reached = 0;
        for (int64_t i = 0; i < n; ++i) above += keys[i] > least;
        for (int64_t i = 0; i < n; ++i) reached += keys[i] >= least;
        // Among too many ties keeps the first; with ids, all of them.
        int64_t ties = ids_ || reached <= wanted + slack ? n : wanted - above;
        cut();
        Candidate<Key>* const out = best_.get() + count_;
        int64_t found = 0;
        if (ties >= reached - above) {
            for (int64_t i = 0; i < n; ++i) {
                const Key key = keys[i];
                out[found] = {key, position + i};
                found += key >= least;
            }
        } else {
            for (int64_t i = 0; i < n; ++i) {
                const int64_t tie = keys[i] == least;
                out[found] = {keys[i], position + i};
                found += (keys[i] > least) | (tie & static_cast<int64_t>(ties > 0));
                ties -= tie;
            }
        }
        count_ += found;
    }

    // At least k of the scores to take have keys of at least `least`. If that is -infinity, its maxima may be NaN.
    void raise_floor(Key least) {
        if (least <= -Score<T>::kInfinity || least <= bound_) return;
        floor_ = least;
        bound_ = least - 1;
        before_floor_ = count_;
    }

    void take(const T* scores, int64_t n, int64_t position) {
        const int64_t found = loops_.scan(scores, n, bound_, position, best_.get() + count_);
        count_ += ids_ ? without_late_ties(found) : found;
        // k scores reach the floor, and later ones have larger positions, so equality no longer suffices.
        if (!ids_ && count_ - before_floor_ >= k_) bound_ = std::max(bound_, floor_);
        if (count_ > std::max(4 * k_, kRoom)) cut();
    }

    // Of the candidates just appended, keeps those that do not come after the last tie that the last cut kept.
    int64_t without_late_ties(int64_t found) {
        if (last_tie_ < 0) return found;
        Candidate<Key>* const added = best_.get() + count_;
        int64_t kept = 0;
        for (int64_t i = 0; i < found; ++i) {
            const Candidate<Key> item = added[i];
            if (item.key != tie_key_ || ids_.before(item.position, last_tie_)) added[kept++] = item;
        }
        return kept;
    }

    // Leaves the k best, still in order of position, and a bound for later scores.
    void cut() {
        if (count_ <= k_) return;
        for (int64_t i = 0; i < count_; ++i) scratch_[i] = best_[i].key;
        const int64_t slack = ids_ ? kExactly : 0;  // with ids, find the last of its ties
        const Key least = kth_largest(scratch_.get(), count_, k_, slack, scratch_.get(), counts_.get(), loops_.extremes);
        int64_t ties = k_;
        for (int64_t i = 0; i < count_; ++i) ties -= best_[i].key > least;
        if (ids_) {
            last_tie_ = last_of_ties(least, ties);
            tie_key_ = least;
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < count_; ++i) {
            const Candidate<Key> item = best_[i];
            const bool tie = item.key == least && (ids_ ? !ids_.before(last_tie_, item.position) : ties-- > 0);
            best_[kept] = item;
            kept += item.key > least || tie;
        }
        count_ = before_floor_ = k_;
        floor_ = std::max(floor_, least);
        bound_ = std::max<Key>(bound_, ids_ ? least - 1 : least);
    }

    // Position of the n-th candidate, by id, of those with this key.
    int64_t last_of_ties(Key key, int64_t n) {
        int64_t ties = 0;
        for (int64_t i = 0; i < count_; ++i) {
            ties_[ties] = best_[i].position;
            ties += best_[i].key == key;
        }
        std::nth_element(ties_.get(), ties_.get() + (n - 1), ties_.get() + ties, [&](int64_t a, int64_t b) { return ids_.before(a, b); });
        return ties_[n - 1];
    }

    TopkLoops<T> loops_;
    int64_t k_, segment_;  // scores wanted, and of a row at a time
    RowIds ids_{};
    int64_t count_ = 0, before_floor_ = 0;  // candidates, and those of them from before the floor was raised
    Key bound_ = 0, floor_ = 0;             // scores enter above the bound; at least k scores are known to reach the floor
    Key tie_key_ = 0;
    int64_t last_tie_ = -1;  // position; with ids, a score of tie_key_ enters if it stands before this one
    std::unique_ptr<Key[]> maxima_, scratch_;
    std::unique_ptr<Candidate<Key>[]> best_, other_;
    std::unique_ptr<int64_t[]> counts_, ties_;
    std::unique_ptr<T[]> gathered_;
};

template <class T>
void topk_typed(const TopkProblem& p, int threads, Level asked) {
    const TopkLoops<T> loops = at_level(asked, [](auto level) { return topk_loops<T, level>(); });
    const int wanted = p.rows * p.columns < kSerialBelow ? 1 : std::max(threads, 1);
    // Rows are split into parts only if there are too few rows; the result is the same.
    const bool apart = p.rows < wanted && p.columns / wanted >= kPart && reach_for(p.columns / wanted, p.k) >= kLeastReach;
    const int64_t parts = apart ? (wanted + p.rows - 1) / p.rows : 1, length = (p.columns + parts - 1) / parts, items = p.rows * parts;
    const auto scores_of = [&](int64_t row) { return static_cast<const T*>(p.scores) + row * p.row_stride; };
    const auto ids_of = [&](int64_t row) { return RowIds{p.ids ? p.ids + row * p.id_row_stride : nullptr, p.id_column_stride}; };
    const auto write = [&](Selector<T>& selector, int64_t row) {
        selector.write(scores_of(row), p.column_stride, static_cast<T*>(p.values) + row * p.k, p.indices + row * p.k);
    };
    std::vector<Selector<T>> selectors;
    for (int64_t left = apart ? items : std::min<int64_t>(items, wanted); left > 0; --left) {
        selectors.emplace_back(loops, length, p.k, p.column_stride == 1, p.ids != nullptr);
    }
    parallel_for(items, wanted, [&](int64_t item, int worker) {
        Selector<T>& selector = selectors[static_cast<size_t>(apart ? item : worker)];
        const int64_t row = item / parts, part = item % parts;
        selector.start_row(ids_of(row));
        selector.show(scores_of(row), p.column_stride, part * length, std::min(p.columns, (part + 1) * length));
        if (!apart) write(selector, row);
    });
    for (int64_t row = 0; apart && row < p.rows; ++row) {
        Selector<T>& first = selectors[static_cast<size_t>(row * parts)];
        for (int64_t part = 1; part < parts; ++part) first.absorb(selectors[static_cast<size_t>(row * parts + part)]);
        write(first, row);
    }
}

}  // namespace

void topk_cpu(const TopkProblem& problem, int threads, Level level) {
    if (problem.rows == 0) return;
    with_type<float, double, bfloat16, float16>(problem.dtype, [&](auto zero) { topk_typed<decltype(zero)>(problem, threads, level); });
}

}  // namespace ttcfast
